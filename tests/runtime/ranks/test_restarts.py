"""Ranks that torchrun starts again after one of them was killed go on from the last checkpoint.

Run as a script, this file is one of the ranks.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from ppo_runtime.loop import train
from tests.runtime.support.processes import ROOT
from tests.runtime.support.trainers import make_trainer

STEPS = 4


def be_one_rank(home: Path, *, killed: bool) -> None:
    """Train; in the third step of the first attempt the second rank is killed."""
    torch.set_num_threads(1)
    rows = [{"input_ids": [5 + row] * (1 + row % 3)} for row in range(12)]
    trainer = make_trainer(
        dataset=rows, batch_size=2, project_kwargs={"logging_dir": str(home / "logs")}, ranks_timeout=60
    )

    def score(_: list[str], texts: list[str]) -> list[float]:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if killed and first and trainer.current_step == 2 and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return [len(set(text)) / 4 for text in texts]

    console = Console(file=io.StringIO())
    options = {"generation_kwargs": {"max_new_tokens": 4}, "output_dir": home, "checkpoint_every": 1, "resume": True}
    train(trainer, score, steps=STEPS, console=console, **options)


def ended(home: Path, *, killed: bool) -> bytes:
    """The model of a run under torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", __file__, str(home), "killed" if killed else ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return (home / "model" / "model.safetensors").read_bytes()


def test_ranks_that_are_started_again_end_where_they_would_have(tmp_path: Path) -> None:
    """What those of before have left in the store, which torchrun keeps, is not taken for the others' addresses."""
    assert ended(tmp_path / "killed", killed=True) == ended(tmp_path / "whole", killed=False)


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]), killed=sys.argv[2] == "killed")
