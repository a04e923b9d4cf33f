"""From tensors of a step to the dictionary of statistics, equal on every rank."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_core.averages import Average, average, mean_of
from ppo_core.moments import Moments, masked_moments, variance
from ppo_runtime.distributed import Maximum, World, gather_averages, gather_rows, merge_moments
from ppo_runtime.update import Outcome


class Rollout(NamedTuple):
    """What was known of a batch before it was trained on."""

    mask: Tensor
    """[B, T] boolean, True on response tokens that count."""
    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    """[B, T] the penalty's estimate, nats."""
    scores: Tensor
    """[B] as they were rewarded."""
    non_score_rewards: Tensor
    query_lengths: Tensor
    response_lengths: Tensor


class Parts(NamedTuple):
    """Statistics of one rank, in the forms that can be merged over ranks."""

    averages: dict[str, Average | Maximum]
    moments: dict[str, tuple[Tensor, Tensor]]
    """Names with {} for "mean" and for "var" or "std", to entries and which of them count."""
    distributions: dict[str, Tensor]


def global_moments(x: Tensor, mask: Tensor, world: World) -> Moments:
    """Moments of the kept entries over all ranks."""
    return merge_moments(masked_moments(x, mask), world)


def step_statistics(
    seen: Rollout,
    outcome: Outcome,
    *,
    values: Tensor,
    raw_advantages: Tensor,
    advantages: Tensor,
    returns: Tensor,
    kl_coef: float,
    learning_rate: float,
    vf_coef: float,
    world: World,
) -> dict[str, Any]:
    """All statistics of :data:`ppo_runtime.metrics.METRICS` but the timings."""
    mask = seen.mask
    parts = rollout_parts(seen)
    parts.averages.update(outcome.averages)
    parts.averages["ppo/policy/first_minibatch_ratio_deviation"] = Maximum(outcome.first_ratio_deviation)
    parts.averages["ppo/policy/advantages_mean"] = average(raw_advantages, mask)
    parts.moments["ppo/returns/{}"] = (returns, mask)
    parts.moments["ppo/val/{}"] = (values, mask)
    parts.distributions["ppo/policy/advantages"] = advantages[mask]
    stats = merged(parts, world)
    stats |= {
        "objective/kl_coef": kl_coef,
        "ppo/learning_rate": learning_rate,
        "ppo/loss/total": stats["ppo/loss/policy"] + vf_coef * stats["ppo/loss/value"],
        "ppo/policy/skipped_updates": outcome.skipped.total(),
        "ppo/policy/epochs": outcome.epochs,
        "ppo/val/var_explained": var_explained(stats["ppo/val/error"], stats["ppo/returns/var"]),
    }
    stats.setdefault("ppo/policy/grad_norm", 0.0)  # every update was skipped
    return stats


def rollout_parts(seen: Rollout) -> Parts:
    """The statistics that need no training."""
    every = torch.ones(len(seen.mask), dtype=torch.bool, device=seen.mask.device)
    kl_per_sequence = seen.kl.sum(-1)
    return Parts(
        averages={
            "objective/kl": average(kl_per_sequence, every),
            "objective/entropy": average(-seen.logprobs.sum(-1), every),
            "ppo/mean_non_score_reward": average(seen.non_score_rewards, seen.mask),
        },
        moments={
            "ppo/{}_scores": (seen.scores, every),
            "tokens/queries_len_{}": (seen.query_lengths, every),
            "tokens/responses_len_{}": (seen.response_lengths, every),
        },
        distributions={
            "objective/kl_dist": kl_per_sequence,
            "objective/logprobs": seen.logprobs[seen.mask],
            "objective/ref_logprobs": seen.ref_logprobs[seen.mask],
            "tokens/queries_dist": seen.query_lengths.float(),
            "tokens/responses_dist": seen.response_lengths.float(),
        },
    )


def merged(parts: Parts, world: World) -> dict[str, Any]:
    """Floats and numpy arrays: averages in one collective, moments folded, distributions gathered entry by entry."""
    stats: dict[str, Any] = {
        name: float(metric.value if isinstance(metric, Maximum) else mean_of(metric))
        for name, metric in gather_averages(parts.averages, world).items()
    }
    for name, (x, kept) in parts.moments.items():
        moments = global_moments(x.to(kept.device).float(), kept, world)
        spread = variance(moments, correction=1)
        stats[name.format("mean")] = float(moments.mean)
        if name.startswith(("ppo/returns", "ppo/val")):
            stats[name.format("var")] = float(spread)
        else:
            stats[name.format("std")] = float(spread.sqrt())
    for name, values in parts.distributions.items():
        stats[name] = gather_rows(values, world).cpu().numpy()
    return stats


def var_explained(error: float, returns_variance: float) -> float:
    """1 - error / variance, 0 where the returns do not vary."""
    return 1.0 - error / returns_variance if returns_variance > 0 else 0.0


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are single numbers: what a curve can show. Their names are shared by all steps of a history."""
    return {sys.intern(name): float(value) for name, value in stats.items() if isinstance(value, int | float)}
