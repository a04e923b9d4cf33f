"""Ranks: who we are, and gathers that leave the same bits on every one of them.

The core gives monoids (:class:`~ppo_core.averages.Average`, :class:`~ppo_core.moments.Moments`); here they are
gathered in one collective and folded locally in rank order. Every function is a collective: all ranks must call it,
in the same order. In a world of one, none of them needs a process group.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from hashlib import sha256
from itertools import chain
from typing import NamedTuple, TypeVar, cast

import attrs
import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ppo_core import averages, moments
from ppo_core.averages import Average
from ppo_core.moments import Moments
from ppo_runtime.config import processes_started

CAPACITY = 1024
"""How many metrics one gather carries. A fixed size keeps ranks whose keys differ from waiting for each other."""


@attrs.frozen
class World:
    """The ranks that train together, and which of them this process is."""

    rank: int
    size: int


class Maximum(NamedTuple):
    """A largest value. The neutral element is ``Maximum(-inf)``."""

    value: Float[Tensor, ""]


class Minimum(NamedTuple):
    """A smallest value. The neutral element is ``Minimum(inf)``."""

    value: Float[Tensor, ""]


Metric = TypeVar("Metric", bound=Average | Maximum | Minimum)


def world_from_environment() -> World:
    """The world that ``torchrun`` describes; a world of one where it describes none.

    An initialised process group is used as it is. Otherwise, with WORLD_SIZE above 1, a gloo group is initialised.

    Raises:
        ValueError: one of torchrun's variables is missing, or WORLD_SIZE is no number of processes.
        RuntimeError: the initialised group can't carry CPU tensors.
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
        dist.init_process_group("gloo")
    if "gloo" not in (backend := str(dist.get_backend_config())):
        raise RuntimeError(
            f"the process group has backend {backend}, expected one that carries CPU tensors; "
            "initialise it with 'gloo' or 'cpu:gloo,cuda:nccl'"
        )
    return World(rank=dist.get_rank(), size=dist.get_world_size())


def gather_averages(metrics: Mapping[str, Metric], world: World) -> dict[str, Metric]:
    """Every metric merged over all ranks, in one collective and in float64.

    Args:
        metrics: scalars, under the same keys on every rank: averages (totals and weights add up), maxima and minima.
            A rank with nothing to say about one of them gives its neutral element.
        world: the ranks.

    Raises:
        ValueError: keys or kinds differ between the ranks (raised on all of them), a metric is not a scalar, or there
            are more than ``CAPACITY``.
    """
    keys = sorted(metrics)
    kinds = [f"{type(metrics[key]).__name__} {key}" for key in keys]
    if len(keys) > CAPACITY:
        raise ValueError(f"metrics has {len(keys)} entries, expected at most {CAPACITY}; raise distributed.CAPACITY")
    vector = torch.zeros(1 + 2 * CAPACITY, dtype=torch.float64)
    vector[0] = _stamp("\n".join(kinds))
    fields = vector[1:].view(2, CAPACITY)
    for slot, key in enumerate(keys):
        for row, field in enumerate(metrics[key]):
            if field.ndim != 0:
                raise ValueError(f"metrics[{key!r}] has shape {tuple(field.shape)}, expected a scalar; reduce it first")
            fields[row, slot] = field.detach().cpu()  # not every device has float64
    table = _gather(vector, world)
    if not (table[:, 0] == table[0, 0]).all():
        raise ValueError(_difference(kinds, world))
    first, second = (list(columns) for columns in table[:, 1:].view(-1, 2, CAPACITY).unbind(1))
    merged = {
        Average: reduce(averages.merge, map(Average, first, second)),
        Maximum: Maximum(reduce(torch.maximum, first)),
        Minimum: Minimum(reduce(torch.minimum, first)),
    }
    return {
        key: cast(Metric, type(metrics[key])(*(field[slot] for field in merged[type(metrics[key])])))
        for slot, key in enumerate(keys)
    }


def merge_moments(m: Moments, world: World) -> Moments:
    """Moments over all ranks, merged in float64 and returned in the dtype of ``m``."""
    if world.size == 1:
        return m
    stacked = torch.stack([field.detach().cpu().double() for field in m])
    parts = _gather(stacked.flatten(), world).view(world.size, *stacked.shape)
    return Moments(*(field.to(m.mean) for field in reduce(moments.merge, (Moments(*part) for part in parts))))


def gather_rows(x: Shaped[Tensor, " rows"], world: World) -> Shaped[Tensor, " all_rows"]:
    """The entries of all ranks, one rank after another; how many each has may differ. Two collectives.

    Raises:
        ValueError: ``x`` is not one-dimensional, or (on all ranks) its dtype differs between them.
    """
    if x.ndim != 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected one axis; gather x.flatten()")
    if world.size == 1:
        return x.detach()
    # As bytes, since gloo knows only some dtypes.
    payload = _as_bytes(x)
    sizes, dtypes = _gather(torch.tensor([len(payload), _stamp(str(x.dtype))]), world).unbind(1)
    if not (dtypes == dtypes[0]).all():
        raise ValueError(f"x has dtype {x.dtype} here and another on some rank, expected one dtype; convert it first")
    padded = payload.new_zeros(max(1, int(sizes.max())))
    padded[: len(payload)] = payload
    rows = [row[:size].clone().view(x.dtype) for row, size in zip(_gather(padded, world), sizes, strict=True)]
    return torch.cat(rows).to(x.device)


def agree_any(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank: the same answer everywhere, so that all stop or skip together."""
    return bool(agree_largest(flag, world))


def agree_largest(number: int, world: World) -> int:
    """The largest of the ranks' integers, the same everywhere."""
    return int(_gather(torch.tensor([int(number)]), world).max())


@contextmanager
def all_or_none(world: World) -> Iterator[None]:
    """Work without collectives that every rank must get through: where one fails, all of them raise.

    Otherwise the others would wait for it in their next collective.
    """
    try:
        yield
    except BaseException:
        agree_any(True, world)
        raise
    if agree_any(False, world):
        raise RuntimeError("another rank refused what it was given, or failed: see its message. Nothing changed here")


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its sum over all ranks, in one collective, in float32 or wider.

    The sum, not the mean: losses are divided by global weights, so that no result depends on how a batch was split.
    A missing gradient counts as zero if another rank has one, and stays missing if none has.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if world.size == 1 or not trainable:
        return
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in trainable), torch.float32)
    present = torch.tensor([parameter.grad is not None for parameter in trainable])
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in trainable)
    flat = torch.cat([present.to(dtype), *(gradient.detach().flatten().to("cpu", dtype) for gradient in gradients)])
    dist.all_reduce(flat)
    holders, *sums = flat.split([len(trainable), *(parameter.numel() for parameter in trainable)])
    for parameter, held, total in zip(trainable, holders.tolist(), sums, strict=True):
        if held:
            parameter.grad = total.view_as(parameter).to(parameter, copy=True)


def broadcast_parameters(module: nn.Module, world: World) -> None:
    """Overwrite parameters and buffers by those of rank 0."""
    if world.size == 1:
        return
    for tensor in chain(module.parameters(), module.buffers()):
        payload = _as_bytes(tensor)
        dist.broadcast(payload, src=0)
        with torch.no_grad():
            tensor.copy_(payload.view(tensor.dtype).view_as(tensor))


def _gather(vector: Tensor, world: World) -> Tensor:
    """[n] on every rank to [size, n], one row per rank."""
    if world.size == 1:
        return vector[None]
    table = vector.new_empty(world.size, len(vector))
    dist.all_gather(list(table), vector)
    return table


def _as_bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().flatten().contiguous().view(torch.uint8)


def _stamp(text: str) -> int:
    """48 bits of a digest: equal on all machines and exact in float64."""
    return int.from_bytes(sha256(text.encode()).digest()[:6], "big")


def _difference(kinds: list[str], world: World) -> str:
    """What differs, in words. Every rank has seen the stamps differ, so that all of them meet in this collective."""
    everyone: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(everyone, kinds)
    common = set.intersection(*map(set, everyone))
    extras = "; ".join(f"rank {rank}: {sorted(set(kinds) - common)}" for rank, kinds in enumerate(everyone))
    return (
        f"metrics differ between ranks, expected the same keys and kinds on all; beyond what all have, {extras}. "
        "Give the neutral element where a rank has nothing to say, e.g. Average(0, 0)"
    )
