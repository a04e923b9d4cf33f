"""The processes that train together, and the process group in which they meet."""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ppo_runtime.common.errors import chained
from ppo_runtime.common.launcher import processes_started


@attrs.frozen
class World:
    """The ranks that train together, and which of them this process is."""

    rank: int
    size: int


def world_from_environment(timeout: float | None = None) -> World:
    """The world that ``torchrun`` describes; a world of one where it describes none.

    An initialised process group is used as it is. Otherwise, with WORLD_SIZE above 1, one is made: gloo carries tensors
    on the CPU, and nccl those on GPUs where there are any. A group made here is left when the process ends.

    Args:
        timeout: seconds that a rank waits for another one in a group made here; as long as torch does if None.

    Raises:
        ValueError: one of torchrun's variables is missing, or WORLD_SIZE is no number of processes.
        RuntimeError: the initialised group can't carry CPU tensors; or the other ranks have not come in time.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if processes_started() == 1:
            return World(rank=0, size=1)
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set, expected all of "
                "torchrun's variables; start with torchrun --nproc-per-node N, or unset WORLD_SIZE"
            )
        _meet(timeout)
    if "gloo" not in (backend := str(dist.get_backend_config())):
        raise RuntimeError(
            f"the process group has backend {backend}, expected one that carries CPU tensors; "
            "initialise it with 'gloo' or 'cpu:gloo,cuda:nccl'"
        )
    return World(rank=dist.get_rank(), size=dist.get_world_size())


def speaks_nccl() -> bool:
    """Whether the ranks meet by nccl, which refuses two of them on one GPU."""
    return dist.is_available() and dist.is_initialized() and "nccl" in str(dist.get_backend_config())


def named(ranks: Sequence[int]) -> str:
    """Ranks in words: "rank 1", "ranks 0, 2 and 3"; the first few of many."""
    first, more = list(map(str, ranks[:4])), len(ranks) - 4
    if more > 0:
        first.append(f"{more} more")
    listed = first[0] if len(first) == 1 else f"{', '.join(first[:-1])} and {first[-1]}"
    return f"rank{'' if len(ranks) == 1 else 's'} {listed}"


def _meet(timeout: float | None) -> None:
    """Make the process group, and leave it at the end, of which torch would complain otherwise."""
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    waiting: dict[str, Any] = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
    try:
        store, rank, size = next(rendezvous("env://", **waiting))
        if waiting:
            store.set_timeout(waiting["timeout"])
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=dist.distributed_c10d.PrefixStore(f"ppo/attempt {_attempt()}", store),
            rank=rank,
            world_size=size,
            **waiting,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {os.environ['RANK']} could not meet the others of WORLD_SIZE = {os.environ['WORLD_SIZE']} ranks: "
            f"{error}; see why they have not come, or set ranks_timeout to more seconds if they come later"
        ) from error
    atexit.register(_part)


def _attempt() -> str:
    """How often the ranks have been started again: the agent's store still holds the addresses of those before.

    Several agents may count differently, since each counts the failures of its own ranks.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"


def _part() -> None:
    """Leave the process group, and end its threads before Python does, with whose tensors they would go on."""
    for error in chained(getattr(sys, "last_value", None), contexts=True):
        traceback.clear_frames(error.__traceback__)  # told already, and its frames may hold the group
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
