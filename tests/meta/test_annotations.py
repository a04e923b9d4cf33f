"""The annotations of ppo_core are true: the specification passes with jaxtyping's run-time checker switched on."""

import os
import subprocess
import sys
from pathlib import Path

from tests.core.subject import only_ours

ROOT = Path(__file__).parent.parent.parent

# What calls a function wrongly on purpose is refused by the checker first, in its own words.
WRONG_ON_PURPOSE = "refused or bad_ or checked or compil"


@only_ours
def test_annotations_are_true():
    """Every call of the fast property files has the shapes and dtypes that the annotations promise."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "core").glob("test_*.py")
        if path.stem not in ("test_compiled", "test_contracts", "test_ground_truth")
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        "-m",
        "not compiled",
    ]
    checker = ["-p", "tests.meta.checker", "--jaxtyping-packages", "ppo_core,tests.meta.checker.check"]
    done = subprocess.run(
        [*command, *checker, "-k", f"not ({WRONG_ON_PURPOSE})", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        env=os.environ | {"HYPOTHESIS_PROFILE": "quick"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_the_checker_bites():
    """With the checker on, a call whose shapes contradict each other is refused."""
    wrong = """
import tests.meta.checker
from jaxtyping import install_import_hook
with install_import_hook("ppo_core", "tests.meta.checker.check"):
    from ppo_core import masking
import torch
masking.keep(torch.ones(2), torch.ones(3, dtype=torch.bool))
"""
    done = subprocess.run([sys.executable, "-c", wrong], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "TypeCheckError" in done.stderr
