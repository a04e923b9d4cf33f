"""A run that is killed, whenever that is, loses nothing: a few moments here, and as many as one likes by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.support.divided import need_divided_models

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/fd").is_dir(), reason="forks, and looks into /proc")
@pytest.mark.parametrize(("ranks", "parallelism"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2")])
def test_a_killed_run_is_resumed_bit_for_bit(ranks: int, parallelism: str) -> None:
    if parallelism == "fsdp2":
        need_divided_models()
    module = "tests.runtime.training.kills"
    asked = f"--kills 5 --inside 3 --results 1 --ranks {ranks} --seed 1 --parallelism {parallelism}"
    done = subprocess.run(
        [sys.executable, "-m", module, *asked.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    told = "5 kills, 3 of them inside the save of a checkpoint and 1 of the model: 0 runs differ"
    assert told in done.stdout, done.stdout + done.stderr
