"""Statistics as TRL passes them around: flat dictionaries of tensors, gathered over ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppo_core.averages import Average, mean_of
from ppo_core.moments import variance
from ppo_runtime.ranks.gather import gather_metrics, global_moments
from ppo_runtime.ranks.world import World, world_from_environment

TOKENS = "minibatch/tokens"
"""Kept tokens of a minibatch: the weight of its other single numbers."""


def get_global_statistics(
    accelerator: Any = None, xs: Tensor | None = None, mask: Tensor | None = None, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance (divided by the count) and count of the kept entries over all ranks, on ``device``.

    Called as ``get_global_statistics(accelerator, xs, mask)`` or without the accelerator, which is not used. Entries
    are summed under the mask; TRL sums all of them and divides by the number of kept ones.
    """
    if isinstance(accelerator, Tensor):
        xs, mask = accelerator, xs if mask is None else mask
    elif xs is None and accelerator is not None:
        xs = accelerator  # to be named for what it is
    if not isinstance(xs, Tensor):
        raise TypeError(f"xs is a {type(xs).__name__}, expected a torch.Tensor; torch.as_tensor(xs) makes one")
    xs = xs if xs.is_floating_point() else xs.float()
    kept = torch.ones_like(xs, dtype=torch.bool) if mask is None else mask.bool()
    moments = global_moments(xs, kept, world_from_environment())
    return moments.mean.to(device), variance(moments, correction=0).to(device), moments.n.long().to(device)


def gather_stats(stats: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Statistics over all ranks; to be called by all of them, with the same keys.

    - An ``Average`` is merged by its weights.
    - A tensor without axes is averaged over ranks, weighted by the tokens of their minibatches where ``stats`` tells
      them (``minibatch/tokens``, itself summed), else with every rank counting alike.
    - Any other tensor is a distribution: the entries of all ranks, one after another, in one axis.
    - Whatever is no tensor stays: what ``step`` and ``record_step_stats`` return is gathered already.

    Raises:
        ValueError: (on all ranks) their keys differ.
    """
    if world.size == 1:
        return {key: mean_of(value) if isinstance(value, Average) else value for key, value in stats.items()}
    weight = torch.as_tensor(stats.get(TOKENS, 1.0)).cpu().double()  # not every device has float64
    averages: dict[str, Average] = {}
    for key, value in stats.items():
        if isinstance(value, Average):
            averages[key] = value
        elif isinstance(value, Tensor) and value.ndim == 0:
            averages[key] = Average(value.detach().cpu().double() * (1.0 if key == TOKENS else weight), weight)
        elif not isinstance(value, Tensor):
            # Nothing to average; here for the comparison of keys.
            averages[f"{key} (as it is)"] = Average(weight.new_zeros(()), weight.new_zeros(()))
    rows = {key: value.flatten() for key, value in stats.items() if isinstance(value, Tensor) and value.ndim}
    found, distributions = gather_metrics(averages, rows, world)
    gathered: dict[str, Any] = {}
    for key, value in sorted(stats.items()):
        if isinstance(value, Average):
            gathered[key] = mean_of(found[key])
        elif isinstance(value, Tensor) and value.ndim == 0:
            merged = found[key].total if key == TOKENS else mean_of(found[key])
            gathered[key] = merged.to(value.dtype).to(value.device)
        else:
            gathered[key] = distributions.get(key, value)
    return gathered
