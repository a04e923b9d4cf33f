"""What torchrun tells each process: numbers in the environment, until there is a process group."""

import os
import sys
from typing import Any


def number_in_environment(name: str, meaning: str, *, least: int, default: int) -> int:
    """One of torchrun's numbers; the default where the launcher leaves it out, or empty."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal() or int(text) < least:
        raise ValueError(
            f"{name} is {text!r} in the environment, expected {meaning}, such as {least + 1}; start with "
            f"torchrun --nproc-per-node N, or unset {name}"
        )
    return int(text)


def processes_started() -> int:
    """Processes that train together: those of the process group, else those that torchrun has started, else 1."""
    dist: Any = sys.modules.get("torch.distributed")  # not imported for a number
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return number_in_environment("WORLD_SIZE", "the number of processes", least=1, default=1)


def processes_here() -> int:
    """Those of them on this machine: all, unless torchrun says how many."""
    started = processes_started()
    here = number_in_environment(
        "LOCAL_WORLD_SIZE", "the number of processes on this machine", least=1, default=started
    )
    return min(here, started)


def speaks_for_all() -> bool:
    """Whether this is the only process or the first of several, as far as the environment tells."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "1") or os.environ.get("RANK", "0") in ("", "0")
