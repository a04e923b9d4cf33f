"""Every module that is a command answers ``--help`` by its name and does nothing else."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands() -> list[str]:
    """Modules that are run with ``python -m``: packages' ``__main__``, and files with a guard that are no tests."""
    found = []
    for folder in ("ppo_core", "ppo_runtime", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "__main__.py":
                found.append(".".join(path.parent.relative_to(ROOT).parts))
            elif not path.name.startswith("test_") and re.search(
                r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE
            ):
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", commands())
def test_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "__main__.py"), "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code in (0, None)
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split())
    assert re.search(rf"usage: python -m {re.escape(module.removesuffix('.cli'))} ", shown, re.IGNORECASE), shown[:200]
