"""The command; see the package."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.old_scripts.substitutions import (
    DOCUMENT_CHANGES,
    DOCUMENTS,
    EXPECTED_FAILURES,
    IMPORT,
    SCRIPTS,
    TESTS,
    Change,
    Script,
)

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 10


def changed(text: str, changes: Iterable[Change], where: str) -> str:
    """The text with every substitution made; each must find something."""
    for change in changes:
        if change.old not in text:
            sys.exit(f"{where} does not contain {change.old!r}: is the checkout TRL v0.7.11?")
        text = text.replace(change.old, change.new)
    return text


def code_of(path: Path) -> str:
    """A script's text; of a notebook, its code without what only IPython knows."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    lines = (line for line in code.splitlines() if not line.startswith(("%", "!")))
    return "\n".join(lines).replace("display(", "print(")


def document(path: Path, numbers: Iterable[int]) -> str:
    """Some of a page's Python blocks, one after another."""
    blocks = re.findall(r"^```(?:python|py)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return "\n".join(blocks[number] for number in numbers)


def programs(checkout: Path, itrex: Path | None) -> Iterator[tuple[Script, str]]:
    """Every script and page with its changed text."""
    for script in SCRIPTS:
        if script.path or itrex is not None:
            path = checkout / script.path if script.path else itrex
            assert path is not None
            yield script, changed(code_of(path), script.changes, script.name)
    for name, (path, numbers) in DOCUMENTS.items():
        text = document(checkout / path, numbers)
        # Only where the page imports at all; trl.model is a slip of the page's, for trl.models.
        text = text.replace("from trl.model import", "from trl.models import").replace(
            "from trl", "from ppo_runtime.compat"
        )
        changes = DOCUMENT_CHANGES.get(name, ())
        yield Script(f"documentation: {name}", path, changes), changed(text, changes, name)


def environment(folder: Path) -> dict[str, str]:
    """Of the processes: offline, quiet, and this repository first."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / ".cache"),
        "WANDB_MODE": "offline",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(command: list[str], folder: Path, log: Path) -> tuple[bool, str]:
    """Whether a process ended well, and the last line that it printed."""
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=folder, env=environment(folder), stdout=output, stderr=output, timeout=60 * MINUTES
            ).returncode
        except subprocess.TimeoutExpired:
            return False, f"not done after {MINUTES} minutes"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    return code == 0, (errors or lines or [""])[-1][:300]


def run_scripts(checkout: Path, itrex: Path | None, folder: Path, only: list[str]) -> tuple[bool, int]:
    """Run the programs and print a row for each; whether all is well, and how many ran."""
    print("| script | result | changed besides imports, names and sizes |\n| --- | --- | --- |")
    picked = [pair for pair in programs(checkout, itrex) if not only or any(word in pair[0].name for word in only)]
    good = True
    for number, (script, text) in enumerate(picked):
        file = folder / f"script_{number}.py"
        file.write_text(text, encoding="utf-8")
        started = time.monotonic()
        fine, last = run([sys.executable, file.name, *script.arguments], folder, file.with_suffix(".log"))
        good &= fine
        other = "; ".join(
            f"{change.kind}: `{change.old.strip()}`{' (' + change.reason + ')' if change.reason else ''}"
            for change in script.changes
            if change.kind not in (IMPORT, "size")
        )
        result = f"to the end, {time.monotonic() - started:.0f} s" if fine else f"FAILED: {last}"
        print(f"| {script.name} | {result} | {other or 'nothing'} |", flush=True)
    return good, len(picked)


def run_tests(checkout: Path, folder: Path, only: list[str]) -> tuple[bool, int]:
    """Run TRL's tests and print what did not pass, with the reason; whether all is well, and how many ran."""
    package = folder / "old_tests"
    package.mkdir()
    for name in ("__init__.py", "testing_constants.py", *TESTS):
        text = (checkout / "tests" / name).read_text(encoding="utf-8")
        (package / name).write_text(changed(text, TESTS.get(name, ()), name), encoding="utf-8")
    files = [f"old_tests/{name}" for name in TESTS if name.startswith("test_")]
    report = folder / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}", "--rootdir", str(folder)]
    words = [word for word in only if word.isidentifier()]
    if only and not words:  # names of scripts
        return True, 0
    picked = ["-k", " or ".join(words)] if words else []
    fine, last = run([sys.executable, "-m", "pytest", *options, *picked, *files], folder, folder / "tests.log")
    if not report.exists():
        print(f"TRL's tests came to no end: {last}")
        return False, 0
    counts: Counter[str] = Counter()
    good = True
    print("\n| TRL's test | result |\n| --- | --- |")
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        verdict = "skipped" if case.find("skipped") is not None else "passed" if failure is None else "failed"
        counts[verdict] += 1
        if verdict == "passed" and name in EXPECTED_FAILURES:
            print(f"| {name} | passes now: take it out of the expected failures |")
        if failure is not None:
            reason = EXPECTED_FAILURES.get(name)
            good &= reason is not None
            print(
                f"| {name} | {'as expected: ' + reason if reason else 'FAILED: ' + failure.get('message', '')[:300]} |"
            )
    print("\n" + (", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "no test was run"))
    return good and (fine or counts["failed"] > 0 or not counts), sum(counts.values())


def main() -> None:
    """Parse the arguments, make the stand-ins, run everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.old_scripts", description=__doc__)
    parser.add_argument("checkout", type=Path, help="TRL's repository at v0.7.11")
    parser.add_argument("--itrex", type=Path, help="rl_training.py of Intel Extension for Transformers")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of the scripts or tests to run")
    parser.add_argument("--skip", choices=("scripts", "tests"), help="leave these out")
    parser.add_argument("--keep", type=Path, help="an empty directory for models, scripts and logs, kept afterwards")
    options = parser.parse_args()
    if not (options.checkout / "examples").is_dir():
        parser.error(f"checkout is {options.checkout}, expected a directory with TRL's repository")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        if any(options.keep.iterdir()):
            parser.error(f"--keep is {options.keep}, expected an empty directory")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        command = [sys.executable, "-W", "ignore", "-m", "tests.old_scripts.stand_ins", str(folder)]
        fine, last = run(command, ROOT, folder / "stand_ins.log")
        if not fine:
            sys.exit(f"the stand-ins could not be made: {last}")
        results = []
        if options.skip != "scripts":
            results.append(run_scripts(options.checkout, options.itrex, folder, options.only))
        if options.skip != "tests":
            results.append(run_tests(options.checkout, folder, options.only))
    if not any(ran for _, ran in results):
        sys.exit(f"nothing has run: --only is {options.only}, expected words of the names of scripts or tests")
    sys.exit(0 if all(good for good, _ in results) else 1)


if __name__ == "__main__":
    main()
