"""The runner itself: our functions and the textbook's hold everything, and a wrong implementation is found out.

Each run is a process of its own, since the implementation under test is chosen when the tests are imported. The result
for TRL needs its environment and is kept in ``trl-0.11.4.md``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, path=()):
    """``python -m tests.conformance ...`` from the root of the repository."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (*path, *filter(None, [os.environ.get("PYTHONPATH")])))),
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.conformance", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def results(report):
    """result -> sentences, from the written table."""
    found = {"holds": [], "fails": [], "absent": []}
    for sentence, result in re.findall(r"^\| (.+?) \| \**(holds|fails|absent)\** \|", report, re.MULTILINE):
        found[result].append(sentence)
    return found


@pytest.mark.parametrize("adapter", ["ours", "textbook"])
def test_they_hold(adapter, tmp_path):
    """No property fails for ours, nor for the formulas as the papers print them; of ours nothing is absent."""
    done = run(adapter, "--examples", "4", "--quiet", "--report", str(tmp_path / "report.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = results((tmp_path / "report.md").read_text(encoding="utf-8"))
    assert len(found["holds"]) > 90
    assert not found["fails"]
    if adapter == "ours":
        assert not found["absent"]


WRONG = '''
"""Rewards with the score in the last column instead of on the last kept token, and nothing else."""

import torch

from ppo_core.rewards import Rewards
from tests.conformance import areas


def compute_rewards(scores, kl, mask, *, kl_coef):
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    rewards = penalty.clone()
    rewards[:, -1] += scores
    return Rewards(rewards, penalty)


implementation = areas(rewards=[compute_rewards])
'''


def test_a_wrong_implementation_is_found_out(tmp_path):
    """A score in the wrong place fails, with an example; what does not depend on it holds; the rest is absent."""
    (tmp_path / "misplaced.py").write_text(WRONG, encoding="utf-8")
    options = ["--examples", "25", "--only", "rewards", "--only", "whitening", "--report", str(tmp_path / "r.md")]
    done = run("misplaced:implementation", *options, path=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    report = (tmp_path / "r.md").read_text(encoding="utf-8")
    found = results(report)
    assert any("on the last kept token" in sentence for sentence in found["fails"])
    assert any("affine in the coefficient" in sentence for sentence in found["holds"])
    assert any("mean 0 and variance 1" in sentence for sentence in found["absent"])
    example = re.search(r"on the last kept token\. \| \*\*fails\*\* \| `(.+?)`", report)
    assert example
    assert "mask=[[" in example[1]
    assert re.search(r"\d+ properties: \d+ hold, \d+ fail, \d+ absent", done.stdout)


def test_an_unknown_adapter_is_an_error():
    """A name that is no adapter is an error, not a table of absent properties."""
    done = run("nobody")
    assert done.returncode == 2
    assert "nobody: No module named" in done.stderr
