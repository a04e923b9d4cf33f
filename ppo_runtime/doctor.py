"""What is installed and what of it works: versions found and tested, the backend, the machine, the demo's parts.

Nothing is concluded from a version that can be tried instead: the demo's modules are imported, its model is loaded and
run, and the extension is imported in a process of its own.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_runtime.accel.probing import first_line
from ppo_runtime.common.extras import can_be_found, installed_version
from ppo_runtime.common.memory import memory

CONSTRAINTS = Path(__file__).parents[1] / ".ci" / "constraints"
INSTALL = "pip install 'ppo-core[demo]', in a checkout pip install -e '.[demo]'"
DIRECT = (
    *("torch", "transformers", "datasets", "safetensors", "numpy", "attrs", "jaxtyping", "rich", "typer"),
    *("vaderSentiment", "matplotlib", "peft", "intel-extension-for-pytorch"),
)
UNEXPECTED = "nothing needs this; should it look wrong, please report it"
_WIDTH = max(map(len, DIRECT))
DEMO_GIB = 1.3
"""What the demo with its embedded model takes at its peak."""


@attrs.frozen
class Finding:
    """A line of the report."""

    name: str
    value: str
    advice: str | None = None
    """What to do about it, if anything."""
    broken: bool = False
    """The demo can't run like this."""


def diagnose() -> Iterator[Finding]:
    """Everything that is looked at, one after another."""
    machine = f"{platform.system()} {platform.machine()}"
    yield Finding("python", f"{platform.python_version()} on {machine}, {sys.executable}")
    yield Finding("ppo-core", installed_version("ppo-core") or f"not installed, run from {CONSTRAINTS.parents[1]}")
    try:
        yield from versions(*_tested())
    except Exception as error:  # of odd metadata: the parts themselves are tried below
        yield Finding("versions", f"not known ({first_line(error)})", UNEXPECTED)
    for name, check, advice in (
        ("frozen models", _backend, None),
        ("C++ compiler", _compiler, None),
        ("threads", _threads, "reinstall torch"),
        ("memory", _memory, None),
        ("demo: modules", _modules, f"reinstall what the error names, or everything: {INSTALL}"),
        ("demo: score", _score, INSTALL),
        ("demo: curves", _curves, INSTALL),
        ("demo: model", _model, "the files lie in ppo_runtime/demo/assets: reinstall ppo-core, or git checkout them"),
    ):
        yield _tried(name, check, advice)


def report(console: Console) -> int:
    """Print the findings; 0 if the demo can run, 1 if something that it needs is missing or broken."""
    findings = []
    for finding in diagnose():  # each as it comes, since the next may take a minute, or hang
        findings.append(finding)
        row = Table.grid(padding=(0, 2))
        row.add_column(width=_WIDTH, no_wrap=True)
        style = "red" if finding.broken else "yellow" if finding.advice else ""
        row.add_row(finding.name, Text(finding.value, style=style))
        console.print(row)
    for finding in findings:
        if finding.advice:
            kind = "problem" if finding.broken else "note"
            console.print(Text(f"{kind}: {finding.name}: {finding.value}\n    {finding.advice}"), soft_wrap=True)
    broken = any(finding.broken for finding in findings)
    console.print("The demo can't run until the problems above are mended." if broken else "The demo can run.")
    return int(broken)


def versions(tested: dict[str, str] | None, source: str) -> Iterator[Finding]:
    """Versions found, beside what is required and what was tested together (None: not known here)."""
    yield Finding("tested versions", source)
    required, others = _required(), []
    for name in DIRECT:
        found, expected = installed_version(name), (tested or {}).get(_normal(name))
        told = f" (tested {expected})" if expected and expected != _public(found) else ""
        if found is None and can_be_found(name.replace("-", "_")):  # such as a torch that was built in place
            yield Finding(name, f"found, but not its version{told}")
        elif found is None:
            missing = _normal(name) in required
            yield Finding(name, f"not installed{told}", INSTALL if missing else None, broken=missing)
        elif not _satisfies(found, wanted := required.get(_normal(name), "")):
            yield Finding(name, f"{found}, required {wanted}{told}", f"pip install '{name}{wanted}'", broken=True)
        else:
            yield Finding(name, f"{found}{told}")
            others += [f"{name} {found}{told}"] if told else []
    direct = {_normal(name) for name in DIRECT}
    for name, expected in (tested or {}).items():
        found = installed_version(name)
        if name not in direct and found is not None and _public(found) != expected:
            others.append(f"{name} {found} (tested {expected})")
    if others:
        shown = [*others[:8], *(["..."] if len(others) > 8 else [])]
        yield Finding(
            "other than tested",
            f"{len(others)} of the versions: {', '.join(shown)}",
            "should something misbehave, install the tested set, as the README's commands do",
        )


def _tried(name: str, check: Callable[[], Finding | str], advice: str | None) -> Finding:
    """What a check finds; its failure breaks the demo if there is advice for that case, else the demo needs it not."""
    try:
        found = check()
    except (Exception, SystemExit) as error:
        return Finding(name, first_line(error), advice or UNEXPECTED, broken=advice is not None)
    return found if isinstance(found, Finding) else Finding(name, found)


def _backend() -> Finding:
    from ppo_runtime.accel.backends import choose, import_problem
    from ppo_runtime.accel.intel import EXTENSION
    from ppo_runtime.accel.intel import INSTALL as INTEL

    choice = choose("auto", strict=False)
    value = f"accel=auto takes {choice.reason}"
    if choice.backend == "eager":
        return Finding("frozen models", value)
    problem = import_problem(choice.versions, again=True)
    if problem is None:
        return Finding("frozen models", f"{value}; tried just now: it imports, packs and agrees with eager torch")
    value = f"accel=auto takes eager torch: {EXTENSION} can't be used here ({problem})"
    return Finding("frozen models", value, f"nothing needs doing for eager torch; for the extension {INTEL}")


def _compiler() -> str:
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return f"{shutil.which(name) or f'no {name} found'}, for accel=compile alone"


def _threads() -> str:
    import torch

    settings = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([f"{torch.get_num_threads()} of torch on {allowed} processors", *settings])


def _memory() -> Finding:
    total, available = memory()
    value = f"{_gib(total)} in all, {_gib(available)} available"
    if available is not None and available < DEMO_GIB * 2**30:
        return Finding("memory", value, f"the demo takes about {DEMO_GIB} GiB: end other programs, or --batch-size 16")
    return Finding("memory", value)


def _modules() -> str:
    import ppo_runtime.demo.run

    return f"{Path(ppo_runtime.demo.run.__file__).parent} imports"


def _score() -> str:
    from ppo_runtime.demo.run import sentiment

    good, bad = sentiment()(["I love this wonderful day", "I hate this horrible day"])
    if not good > bad:
        raise RuntimeError(f"VADER scores a cheerful sentence {good} and a gloomy one {bad}")
    return "VADER scores"


def _curves() -> str:
    import matplotlib.figure

    matplotlib.figure.Figure()
    return "matplotlib draws"


def _model() -> str:
    import torch

    from ppo_runtime.demo.run import load, load_prompts

    model, tokenizer = load(None)
    prompts = load_prompts()
    if not all(prompts.values()):
        raise RuntimeError("prompts.jsonl has no prompts")
    with torch.no_grad():
        logits = model(**tokenizer(prompts["eval"][0], return_tensors="pt"))[0]
    if not logits.isfinite().all():
        raise RuntimeError("the embedded model's logits are not finite")
    return f"embedded model and {sum(map(len, prompts.values()))} prompts, loaded and run"


def _tested() -> tuple[dict[str, str] | None, str]:
    """The exact versions tested together, for this Python and machine, and where they stand."""
    torch, extension = installed_version("torch") or "", installed_version("intel-extension-for-pytorch")
    file = CONSTRAINTS / ("ipex.txt" if extension or torch.startswith("2.8.") else "newest.txt")
    try:
        return pins(file.read_text(encoding="utf-8")), f"{file}; those below, unless said"
    except FileNotFoundError:
        return None, "not known: they are kept in a checkout, and this is none"
    except (OSError, ImportError, ValueError) as error:
        return None, f"not known: {file} can't be read ({first_line(error)})"


def pins(text: str) -> dict[str, str]:
    """Versions by normalised name of the lines ``name==version ; marker`` that apply here."""
    from packaging.requirements import Requirement

    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        _normal(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def _required() -> dict[str, str]:
    """What ppo-core and its demo need, by normalised name; nothing where ppo-core itself is not installed."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement

        lines = metadata.requires("ppo-core") or []
    except (ImportError, metadata.PackageNotFoundError):
        return {}
    required = {}
    for line in lines:
        with suppress(InvalidRequirement):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": "demo"}):
                required[_normal(requirement.name)] = str(requirement.specifier)
    return required


def _satisfies(version: str, specifier: str) -> bool:
    """True as well of a version that can't be compared, such as one made from a branch's name."""
    if not specifier:
        return True
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True


def _public(version: str | None) -> str | None:
    return version and version.partition("+")[0]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _gib(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 2**30:.1f} GiB"
