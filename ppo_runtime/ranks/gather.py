"""The processes that train together, and gathers that leave the same bits on every one of them.

The core gives monoids (:class:`~ppo_core.averages.Average`, :class:`~ppo_core.moments.Moments`); here they are
gathered, all metrics in one collective, and folded locally in rank order. Every function is a collective: all ranks
must call it, in the same order. In a world of one, none of them needs a process group.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import attrs
import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ppo_core import averages, moments
from ppo_core.averages import Average
from ppo_core.moments import Moments
from ppo_runtime.common.launcher import processes_started
from ppo_runtime.common.transfers import on_cpu

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


Metric = TypeVar("Metric", bound=Average | Maximum | Moments)
FIELDS = len(Moments._fields)
"""The most numbers that a metric consists of."""


class Ballot:
    """The numbers that each rank sends to the others at the end of a block of :func:`all_or_none`."""

    def __init__(self, size: int) -> None:
        self.mine = torch.zeros(size, dtype=torch.float64)
        self.all = self.mine[None]
        """[ranks, size], once the block is left."""


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


def gather_metrics(
    metrics: Mapping[str, Metric], rows: Mapping[str, Shaped[Tensor, " rows"]], world: World
) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """Every metric merged over all ranks, and of every distribution the entries of all, one rank after another.

    One collective for all metrics, in float64, and one for all distributions, whose sizes go with the metrics.

    Args:
        metrics: scalars, under the same keys on every rank. A rank with nothing to say about one of them gives its
            neutral element.
        rows: one-dimensional, under the same keys and of the same dtypes on every rank; how many entries each rank has
            may differ.
        world: the ranks.

    Raises:
        ValueError: keys, kinds or dtypes differ between the ranks (raised on all of them), a metric is not a scalar, a
            distribution has not one axis, or there are more than ``CAPACITY`` of them.
    """
    keys, columns = sorted(metrics), sorted(rows)
    kinds = [f"{type(metrics[key]).__name__} {key}" for key in keys]
    kinds += [f"{rows[name].dtype} {name}" for name in columns]
    if len(kinds) > CAPACITY:
        raise ValueError(f"metrics has {len(kinds)} entries, expected at most {CAPACITY}; raise ranks.gather.CAPACITY")
    vector = torch.zeros(1 + FIELDS * CAPACITY, dtype=torch.float64)
    vector[0] = _stamp("\n".join(kinds))
    fields = vector[1:].view(FIELDS, CAPACITY)
    places: list[tuple[int, int]] = []
    numbers: list[Tensor] = []
    for slot, key in enumerate(keys):
        for row, field in enumerate(metrics[key]):
            if field.ndim != 0:
                raise ValueError(f"metrics[{key!r}] has shape {tuple(field.shape)}, expected a scalar; reduce it first")
            places.append((row, slot))
            numbers.append(field.detach())
    for place, number in zip(places, on_cpu(numbers), strict=True):
        fields[place] = number  # widened here: not every device has float64
    for slot, name in enumerate(columns, len(keys)):
        if rows[name].ndim != 1:
            raise ValueError(f"{name} has shape {tuple(rows[name].shape)}, expected one axis; gather {name}.flatten()")
        fields[0, slot] = rows[name].nbytes
    table = _gather(vector, world)
    if not (table[:, 0] == table[0, 0]).all():
        raise ValueError(_difference(kinds, world))
    table = table[:, 1:].view(-1, FIELDS, CAPACITY)
    merged = {key: _merged(metrics[key], table[:, :, slot]) for slot, key in enumerate(keys)}
    sizes = table[:, 0, len(keys) : len(kinds)].long()
    return merged, _joined({name: rows[name] for name in columns}, sizes, world)


def _merged(metric: Metric, parts: Tensor) -> Metric:
    """One metric of all ranks, [ranks, FIELDS], on the CPU; moments in their own dtype."""
    ways: dict[type, Any] = {Average: averages.merge, Moments: moments.merge, Maximum: _larger}
    found: Any = reduce(ways[type(metric)], (type(metric)(*part[: len(metric)]) for part in parts))
    if isinstance(metric, Moments):
        found = Moments(*(field.to(metric.mean.dtype) for field in found))
    return found


def _larger(a: Maximum, b: Maximum) -> Maximum:
    return Maximum(torch.maximum(a.value, b.value))


def _joined(rows: Mapping[str, Tensor], sizes: Tensor, world: World) -> dict[str, Tensor]:
    """The distributions of all ranks, gathered as bytes, since gloo knows only some dtypes."""
    if world.size == 1 or not rows:
        return {name: x.detach() for name, x in rows.items()}
    totals = sizes.sum(-1)
    padded = torch.zeros(max(1, int(totals.max())), dtype=torch.uint8)
    padded[: totals[world.rank]] = torch.cat([as_bytes(x) for x in rows.values()])
    table = _gather(padded, world)
    parts = [row[:total].split(size) for row, total, size in zip(table, totals, sizes.tolist(), strict=True)]
    return {
        name: torch.cat([part[slot].clone().view(x.dtype) for part in parts]).to(x.device)
        for slot, (name, x) in enumerate(rows.items())
    }


def gather_averages(metrics: Mapping[str, Metric], world: World) -> dict[str, Metric]:
    """Every metric merged over all ranks, in one collective; see :func:`gather_metrics`."""
    return gather_metrics(metrics, {}, world)[0]


def gather_rows(x: Shaped[Tensor, " rows"], world: World) -> Shaped[Tensor, " all_rows"]:
    """The entries of all ranks, one rank after another; see :func:`gather_metrics`. Two collectives."""
    return gather_metrics({}, {"x": x}, world)[1]["x"]


def global_moments(x: Tensor, mask: Tensor, world: World) -> Moments:
    """Moments of the kept entries over all ranks, merged in float64 and returned in the dtype of ``x``."""
    return merge_moments(moments.masked_moments(x, mask), world)


def merge_moments(m: Moments, world: World) -> Moments:
    """Moments over all ranks, merged in float64 and returned in the dtype of ``m``."""
    return folded_moments(m, _gather(packed_moments(m), world))


def packed_moments(m: Moments) -> Tensor:
    """As a vector that can be gathered."""
    return torch.stack([field.double() for field in on_cpu([field.detach() for field in m])]).flatten()


def folded_moments(m: Moments, parts: Tensor) -> Moments:
    """The packed moments [ranks, n] of all ranks in one, in the dtype of ``m``, which are this rank's."""
    if len(parts) == 1:
        return m
    parts = parts.view(len(parts), len(m), *m.mean.shape)
    return Moments(
        *(
            field.to(m.mean.dtype).to(m.mean.device)
            for field in reduce(moments.merge, (Moments(*part) for part in parts))
        )
    )


def agree_any(flag: bool, world: World) -> bool:
    """Whether the flag is set on any rank: the same answer everywhere, so that all stop or skip together."""
    return bool(agree_largest(flag, world))


def agree_largest(number: int, world: World) -> int:
    """The largest of the ranks' integers, the same everywhere."""
    return int(_gather(torch.tensor([int(number)]), world).max())


@contextmanager
def all_or_none(world: World, *, carries: int = 0) -> Iterator[Ballot]:
    """Raise on all ranks if the block fails on any of them; the block itself must not use collectives.

    Without this, the other ranks would wait for the failed one in their next collective.

    Args:
        world: the ranks.
        carries: how many numbers every rank has to tell on this occasion, the same on all of them: what the block
            writes into ``mine`` of the ballot stands in its ``all`` afterwards.
    """
    ballot = Ballot(carries)
    try:
        yield ballot
    except BaseException:
        _gather(torch.cat((torch.ones(1).double(), torch.zeros_like(ballot.mine))), world)
        raise
    told = _gather(torch.cat((torch.zeros(1).double(), ballot.mine)), world)
    ballot.all = told[:, 1:]
    if told[:, 0].any():
        raise RuntimeError("another rank refused what it was given, or failed: see its message. Nothing changed here")


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every gradient by its sum over all ranks, where it lies, in float32 or wider.

    For gradients of passes that torch's DistributedDataParallel has not seen; all of them are on the way at once. A
    missing gradient counts as zero if another rank has one, and stays missing if none has.

    Args:
        parameters: of the model, in the same order on every rank.
        world: the ranks.
    """
    if world.size == 1:
        return
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([parameter.grad is not None for parameter in trainable], dtype=torch.uint8)
    held = _gather(present, world).amax(0).tolist()
    under_way: list[tuple[nn.Parameter, Tensor, Any]] = []
    for parameter in (one for one, anywhere in zip(trainable, held, strict=True) if anywhere):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.detach().to(wide).contiguous()
        under_way.append((parameter, total, dist.all_reduce(total, async_op=True)))
    for parameter, total, work in under_way:
        work.wait()
        parameter.grad = total.to(parameter.dtype)


def broadcast_parameters(module: nn.Module, world: World) -> None:
    """Overwrite parameters and buffers by those of rank 0."""
    if world.size == 1:
        return
    for tensor in chain(module.parameters(), module.buffers()):
        payload = as_bytes(tensor)
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


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor of any dtype and device, [n] on the CPU."""
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
        f"metrics differ between ranks, expected the same keys, kinds and dtypes on all; beyond what all have, "
        f"{extras}. Give the neutral element where a rank has nothing to say, e.g. Average(0, 0)"
    )
