"""One row per property, gathered while pytest runs, and three ways to show them."""

import re
from collections.abc import Iterable

import attrs
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Unsatisfiable, UnsatisfiedAssumption

HOLDS, FAILS, ABSENT = "holds", "fails", "absent"


@attrs.define
class Row:
    """A property: one test function, with whatever it was parametrized by."""

    area: str
    name: str
    sentence: str
    held: list[str] = attrs.field(factory=list)
    failed: dict[str, list[str]] = attrs.field(factory=dict)
    """Parameters to counterexamples, one for each way to fail."""
    absent: dict[str, str] = attrs.field(factory=dict)
    """Parameters to what is missing."""

    @property
    def result(self) -> str:
        """A single failure fails the property; it is absent where no part of it could be asked."""
        return FAILS if self.failed else HOLDS if self.held else ABSENT

    @property
    def detail(self) -> str:
        """The counterexamples, or what is missing."""
        if self.failed:
            first, examples = next(iter(self.failed.items()))
            others = [name for name in self.failed if name != first]
            return (f"[{first}] " if first else "") + "; ".join(examples) + (f"; also {others}" if others else "")
        if self.held:
            return f"absent for {', '.join(name for name in self.absent)}" if self.absent else ""
        return ", ".join(sorted(set(self.absent.values())))


class Collector:
    """A pytest plugin that turns outcomes into rows and sets the number of examples."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.rows: dict[tuple[str, str], Row] = {}
        self.broken: list[str] = []

    def pytest_sessionstart(self) -> None:
        """Same examples every time; a property about few settings may reject most of what is drawn."""
        settings.register_profile(
            "conformance",
            settings(),
            max_examples=self.examples,
            derandomize=True,
            database=None,
            print_blob=False,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        settings.load_profile("conformance")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read is an error of the run, not a result."""
        if report.failed:
            self.broken.append(f"{report.nodeid}\n{report.longreprtext}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        """File the outcome of a test under its property."""
        report = yield
        if call.when == "call" or (call.when == "setup" and call.excinfo is not None):
            self._file(item, call.excinfo.value if call.excinfo else None)
        return report

    def _file(self, item: pytest.Item, error: BaseException | None) -> None:
        function = item.function
        area = item.path.stem.removeprefix("test_")
        row = self.rows.setdefault(
            (area, function.__name__), Row(area, function.__name__, (function.__doc__ or "").strip().split("\n\n")[0])
        )
        parameters = item.callspec.id if hasattr(item, "callspec") else ""
        if error is None:
            row.held.append(parameters)
        elif isinstance(error, pytest.skip.Exception):
            row.absent[parameters] = str(error.msg).removeprefix("absent: ")
        elif isinstance(error, (UnsatisfiedAssumption, Unsatisfiable)):
            row.absent[parameters] = "the settings it speaks of"
        else:
            row.failed[parameters] = [counterexample(part) for part in parts_of(error)]


def parts_of(error: BaseException) -> Iterable[BaseException]:
    """Each distinct failure that hypothesis found."""
    return error.exceptions if hasattr(error, "exceptions") else (error,)


def counterexample(error: BaseException) -> str:
    """The smallest example found, if any, and what came of it, in one line."""
    found = ""
    for note in getattr(error, "__notes__", ()):
        if re.match("(Falsifying|Failing) ", note):
            lines = [re.sub(r"\s*# .*", "", line).strip() for line in note.splitlines()[1:]]
            found = " ".join(line for line in lines if line).strip().removesuffix(")").strip().removesuffix(",")
            found = re.sub(r"^case=Case\((.*)\)$", r"\1", found)
        elif note.startswith("Draw "):
            found += (", " if found else "") + note.split(": ", 1)[-1]
    found = re.sub(r"(\S+, )\1{7,}", r"\1..., ", found)
    return f"{found} gives {consequence(error)}" if found else consequence(error)


def consequence(error: BaseException) -> str:
    """What went wrong, as short as it can be said."""
    text = str(error)
    if isinstance(error, AssertionError):
        # torch.testing: "Expected 0.0 but got nan." for numbers, a greatest difference for tensors
        number = re.search(r"Expected (\S+) but got (\S+)\.\s", text)
        if number:
            return f"{number[2]} where {number[1]} is right"
        difference = re.search(r"Greatest absolute difference: (\S+) at index (\([\d, ]*\))", text)
        if difference:
            return f"an error of {float(difference[1]):.4g} at {difference[2]}"
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}".removeprefix("AssertionError: ").strip()[:200]


def counts(rows: list[Row]) -> str:
    """The last line."""
    number = {result: sum(row.result == result for row in rows) for result in (HOLDS, FAILS, ABSENT)}
    return f"{len(rows)} properties: {number[HOLDS]} hold, {number[FAILS]} fail, {number[ABSENT]} absent"


def markdown(rows: list[Row], title: str, notes: str) -> str:
    """A report to keep."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    def code(text: str) -> str:
        return "`" + " ".join(text.split()).replace("|", "\\|").replace("`", "'") + "`" if text else ""

    lines = [f"# {title}", "", notes, "", f"{counts(rows)}.", ""]
    for area in dict.fromkeys(row.area for row in rows):
        lines += [
            f"## {area}",
            "",
            "| property | result | smallest counterexample, or what is missing |",
            "|---|---|---|",
        ]
        for row in (row for row in rows if row.area == area):
            result = f"**{row.result}**" if row.result == FAILS else row.result
            lines.append(f"| {cell(row.sentence)} | {result} | {code(row.detail)} |")
        lines.append("")
    return "\n".join(lines)


def show(rows: list[Row], title: str) -> None:
    """To the terminal: with rich where it is installed, as plain lines where not."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for row in rows:
            print(f"{row.result:6}  {row.area}: {' '.join(row.sentence.split())}")
            if row.detail:
                print(f"        {row.detail}")
        print(counts(rows))
        return
    table = Table(title=title, show_lines=True, title_justify="left")
    table.add_column("property", ratio=5)
    table.add_column("result", width=6)
    table.add_column("smallest counterexample, or what is missing", ratio=4)
    colours = {HOLDS: "green", FAILS: "bold red", ABSENT: "dim"}
    for row in rows:
        sentence = Text(f"{row.area}: {' '.join(row.sentence.split())}")
        table.add_row(sentence, Text(row.result, style=colours[row.result]), Text(row.detail))
    console = Console()
    console.print(table)
    console.print(counts(rows), highlight=False)
