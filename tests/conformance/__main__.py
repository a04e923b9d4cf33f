"""``python -m tests.conformance ADAPTER``: see the package's docstring."""

import argparse
import contextlib
import io
import os
import platform
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

from tests.conformance import table

CORE = Path(__file__).parent.parent / "core"
HOUSE_FILES = ("test_contracts.py", "test_compiled.py")
HOUSE_TESTS = ("bad_arguments", "are_checked", "is_positive", "compil", "vmap", "function_transforms", "do_not_fit")
"""Vectorisation, compilation and error messages: promises of this package, not properties of PPO's arithmetic."""


def main() -> int:
    """Run the properties and print the table. 0: none fails; 1: some do; 2: they could not be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description="Run the specification.")
    parser.add_argument("adapter", help="ours, textbook, trl, or module:attribute of an adapter")
    parser.add_argument("--report", type=Path, help="also write the table to this file, as Markdown")
    parser.add_argument("--examples", type=int, default=100, help="examples per property (default 100)")
    parser.add_argument("--only", action="append", metavar="AREA", help="only this area, e.g. advantages; repeatable")
    parser.add_argument("--contracts", action="store_true", help="the package's own promises too: vmap, errors, ...")
    parser.add_argument("--quiet", action="store_true", help="print the counts only")
    options = parser.parse_args()

    reference = options.adapter if ":" in options.adapter else f"tests.conformance.{options.adapter}:implementation"
    os.environ["PPO_SPEC_IMPLEMENTATION"] = reference
    try:
        notes = (import_module(reference.partition(":")[0]).__doc__ or "").strip()
    except ModuleNotFoundError as error:
        parser.error(f"adapter {options.adapter}: {error}")

    collector, printed = table.Collector(options.examples), io.StringIO()
    ignored = [f"--ignore={CORE / name}" for name in HOUSE_FILES]
    ignored += ["-k", " and ".join(f"not {name}" for name in HOUSE_TESTS)]
    if options.contracts:
        ignored = []
    files = [str(CORE / f"test_{area}.py") for area in options.only or ()] or [str(CORE)]
    flags = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    with contextlib.redirect_stdout(printed):
        status = pytest.main([*files, *ignored, *flags], plugins=[collector])
    if collector.broken or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(printed.getvalue() or "\n".join(collector.broken), file=sys.stderr)
        return 2

    rows, title = list(collector.rows.values()), f"The specification against {options.adapter}"
    if options.quiet:
        print(table.counts(rows))
    else:
        table.show(rows, title)
    if options.report:
        command = " ".join(["python -m tests.conformance", *sys.argv[1:]])
        made = f"Made by `{command}` with {versions()}; {options.examples} examples per property."
        options.report.write_text(table.markdown(rows, title, f"{made}\n\n{notes}"), encoding="utf-8")
    return int(any(row.result == table.FAILS for row in rows))


def versions() -> str:
    """What the result depends on."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "trl", "transformers", "hypothesis"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
