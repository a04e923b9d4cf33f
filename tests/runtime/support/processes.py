"""Run a file as real gloo processes, two or more, the way torchrun would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[3]


class Ended(NamedTuple):
    """How a process has ended."""

    code: int | None
    """None: it had to be killed when its time was over."""
    complaint: str
    """What it said on standard error."""


def run_ranks(script: str, folder: Path, *, ranks: int = 2, warnings: str = "error") -> list[dict[str, Any]]:
    """What each rank has saved as ``<rank>.pt`` in ``folder``, which it is given as its argument.

    Args:
        script: the file to run, as a module's ``__file__``.
        folder: where the results go.
        ranks: how many processes.
        warnings: what Python does with a warning in them.
    """
    for process in ends_of_ranks([sys.executable, "-W", warnings, script, str(folder)], ranks=ranks, limit=240):
        assert process.code == 0, process.complaint
    # Not weights_only: statistics hold numpy arrays, and the files are of the processes just run.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def ends_of_ranks(command: Sequence[str], *, ranks: int = 2, limit: float) -> list[Ended]:
    """How each rank of a command ends, in not much more than so many seconds."""
    with _started(command, ranks) as processes:
        deadline = time.monotonic() + limit
        return [_end(process, deadline - time.monotonic()) for process in processes]


def _end(process: subprocess.Popen[str], seconds: float) -> Ended:
    try:
        _, complaint = process.communicate(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        return Ended(None, process.communicate()[1])
    return Ended(process.returncode, complaint)


@contextmanager
def _started(command: Sequence[str], ranks: int) -> Iterator[list[subprocess.Popen[str]]]:
    # As torchrun does, hold the store here: no port is guessed, so none can be taken meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()
