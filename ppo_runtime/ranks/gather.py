"""Gathers that leave the same bits on every rank, sums of gradients, and weights that are sent to all.

The core gives monoids (:class:`~ppo_core.averages.Average`, :class:`~ppo_core.moments.Moments`); here they are
gathered, all metrics in one collective, and folded locally in rank order. Every function is a collective: all ranks
must call it, in the same order. In a world of one, none of them needs a process group.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ppo_core import averages, moments
from ppo_core.averages import Average
from ppo_core.moments import Moments
from ppo_runtime.common.transfers import on_cpu
from ppo_runtime.ranks.agreement import all_or_none, gathered
from ppo_runtime.ranks.presence import lost_ranks_named
from ppo_runtime.ranks.world import World

CAPACITY = 1024
"""How many metrics one gather carries. A fixed size keeps ranks whose keys differ from waiting for each other."""


class Maximum(NamedTuple):
    """A largest value. The neutral element is ``Maximum(-inf)``."""

    value: Float[Tensor, ""]


Metric = TypeVar("Metric", bound=Average | Maximum | Moments)
FIELDS = len(Moments._fields)
"""The most numbers that a metric consists of."""


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
        ValueError: (on all ranks) keys, kinds or dtypes differ between them, a metric is not a scalar, a distribution
            has not one axis, or there are more than ``CAPACITY`` of them.
    """
    keys, columns = sorted(metrics), sorted(rows)
    places: list[tuple[int, int]] = []
    numbers: list[Tensor] = []
    with all_or_none(world, carries=FIELDS * CAPACITY, phase="the gathering of metrics") as ballot:
        if len(metrics) + len(rows) > CAPACITY:
            raise ValueError(
                f"metrics has {len(metrics) + len(rows)} entries, expected at most {CAPACITY}; raise "
                "ranks.gather.CAPACITY"
            )
        fields = ballot.mine.view(FIELDS, CAPACITY)
        for slot, key in enumerate(keys):
            for row, field in enumerate(metrics[key]):
                if field.ndim != 0:
                    shape = tuple(field.shape)
                    raise ValueError(f"metrics[{key!r}] has shape {shape}, expected a scalar; reduce it first")
                places.append((row, slot))
                numbers.append(field.detach())
        for place, number in zip(places, on_cpu(numbers), strict=True):
            fields[place] = number  # widened here: not every device has float64
        for slot, name in enumerate(columns, len(keys)):
            if rows[name].ndim != 1:
                shape = tuple(rows[name].shape)
                raise ValueError(f"{name} has shape {shape}, expected one axis; gather {name}.flatten()")
            fields[0, slot] = rows[name].nbytes
        ballot.facts = lambda: {
            **{f"the kind of metric {key}": type(metrics[key]).__name__ for key in keys},
            **{f"the kind of distribution {name}": str(rows[name].dtype) for name in columns},
        }
        ballot.advice = "give the neutral element where a rank has nothing to say, e.g. Average(0, 0)"
    table = ballot.all.view(-1, FIELDS, CAPACITY)
    merged = {key: _merged(metrics[key], table[:, :, slot]) for slot, key in enumerate(keys)}
    sizes = table[:, 0, len(keys) : len(keys) + len(columns)].long()
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
    table = gathered(padded, world, "the gathering of distributions")
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
    return folded_moments(m, gathered(packed_moments(m), world, "the gathering of moments"))


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


def sum_gradients(parameters: Iterable[Tensor], world: World) -> None:
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
    held = gathered(present, world, "the comparison of gradients").amax(0).tolist()
    under_way: list[tuple[Tensor, Tensor, Any]] = []
    with lost_ranks_named(world, "the sum of gradients"):
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
    with lost_ranks_named(world, "the distribution of the weights"):
        for tensor in chain(module.parameters(), module.buffers()):
            payload = as_bytes(tensor)
            dist.broadcast(payload, src=0)
            with torch.no_grad():
                tensor.copy_(payload.view(tensor.dtype).view_as(tensor))


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor of any dtype and device, [n] on the CPU."""
    return x.detach().cpu().flatten().contiguous().view(torch.uint8)
