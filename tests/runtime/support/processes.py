"""Run a file as two real gloo processes, the way torchrun would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[3]


def run_ranks(script: str, folder: Path, *, ranks: int = 2, warnings: str = "error") -> list[dict[str, Any]]:
    """What each rank has saved as ``<rank>.pt`` in ``folder``, which it is given as its argument.

    Args:
        script: the file to run, as a module's ``__file__``.
        folder: where the results go.
        ranks: how many processes.
        warnings: what Python does with a warning in them.
    """
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
    command = [sys.executable, "-W", warnings, script, str(folder)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, complaint = process.communicate(timeout=240)
            assert process.returncode == 0, complaint
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    # Not weights_only: statistics hold numpy arrays, and the files are of the processes just run.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
