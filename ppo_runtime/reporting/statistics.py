"""From tensors of a step to the dictionary of statistics, equal on every rank."""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_core.averages import Average, average, mean_of
from ppo_core.moments import Moments, masked_moments, variance
from ppo_runtime.common.transfers import on_cpu
from ppo_runtime.learning.experience import Experience
from ppo_runtime.learning.update import Outcome
from ppo_runtime.ranks.gather import Maximum, gather_metrics
from ppo_runtime.ranks.world import World
from ppo_runtime.reporting.metrics import METRICS


class Parts(NamedTuple):
    """Statistics of one rank, in the forms that can be merged over ranks."""

    metrics: dict[str, Average | Maximum | Moments]
    """By name; moments by a name with {} for "mean" and for "var" or "std"."""
    distributions: dict[str, Tensor]


def step_statistics(
    batch: Experience,
    outcome: Outcome,
    query_lengths: Tensor,
    response_lengths: Tensor,
    *,
    kl_coef: float,
    learning_rate: float,
    vf_coef: float,
    world: World,
) -> dict[str, Any]:
    """All statistics of :data:`ppo_runtime.reporting.metrics.METRICS` but the timings; two collectives."""
    mask = batch.mask
    parts = rollout_parts(
        batch.logprobs,
        batch.ref_logprobs,
        batch.kl,
        mask,
        scores=batch.scores,
        non_score_rewards=batch.non_score_rewards,
        query_lengths=query_lengths,
        response_lengths=response_lengths,
    )
    parts.metrics.update(outcome.averages)
    parts.metrics.update(
        {
            "ppo/policy/first_minibatch_ratio_deviation": Maximum(outcome.first_ratio_deviation),
            "ppo/policy/advantages_mean": average(batch.raw_advantages, mask),
            "ppo/returns/{}": _moments(batch.returns, mask),
            "ppo/val/{}": _moments(batch.values, mask),
        }
    )
    parts.distributions["ppo/policy/advantages"] = batch.advantages[mask]
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


def rollout_parts(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    scores: Tensor,
    non_score_rewards: Tensor,
    query_lengths: Tensor,
    response_lengths: Tensor,
) -> Parts:
    """The statistics that need no training.

    Args:
        logprobs: [B, T] of the policy before training, 0 where the mask is.
        ref_logprobs: likewise of the reference.
        kl: [B, T] the penalty's estimate, nats.
        mask: [B, T] boolean, True on response tokens that count.
        scores: [B] as they were rewarded.
        non_score_rewards: [B, T].
        query_lengths: [B].
        response_lengths: [B].
    """
    every = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    kl_per_sequence = kl.sum(-1)
    return Parts(
        metrics={
            "objective/kl": average(kl_per_sequence, every),
            "objective/entropy": average(-logprobs.sum(-1), every),
            "ppo/mean_non_score_reward": average(non_score_rewards, mask),
            "ppo/{}_scores": _moments(scores, every),
            "tokens/queries_len_{}": _moments(query_lengths, torch.ones_like(query_lengths, dtype=torch.bool)),
            "tokens/responses_len_{}": _moments(response_lengths, torch.ones_like(response_lengths, dtype=torch.bool)),
        },
        distributions={
            "objective/kl_dist": kl_per_sequence,
            "objective/logprobs": logprobs[mask],
            "objective/ref_logprobs": ref_logprobs[mask],
            "tokens/queries_dist": query_lengths.float(),
            "tokens/responses_dist": response_lengths.float(),
        },
    )


def score_statistics(scores: Tensor, world: World) -> dict[str, Any]:
    """What the user's own scores [B] are, over all ranks, before anything is made of them."""
    every = torch.ones_like(scores, dtype=torch.bool)
    return merged(Parts({"env/reward_{}": _moments(scores, every)}, {"env/reward_dist": scores}), world)


def merged(parts: Parts, world: World) -> dict[str, Any]:
    """Floats and numpy arrays, over all ranks; :data:`METRICS` says whether a spread is a "var" or a "std"."""
    metrics, distributions = gather_metrics(parts.metrics, parts.distributions, world)
    stats: dict[str, Any] = {}
    for name, metric in metrics.items():
        if isinstance(metric, Moments):
            spread = variance(metric, correction=1)
            stats[name.format("mean")] = float(metric.mean)
            if (var := name.format("var")) in METRICS:
                stats[var] = float(spread)
            else:
                stats[name.format("std")] = float(spread.sqrt())
        else:
            stats[name] = float(metric.value if isinstance(metric, Maximum) else mean_of(metric))
    arrays = (x.numpy() for x in on_cpu(list(distributions.values())))
    return stats | dict(zip(distributions, arrays, strict=True))


def _moments(x: Tensor, mask: Tensor) -> Moments:
    return masked_moments(x.float(), mask)


def var_explained(error: float, returns_variance: float) -> float:
    """1 - error / variance, 0 where the returns do not vary."""
    return 1.0 - error / returns_variance if returns_variance > 0 else 0.0


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are single numbers: what a curve can show. Their names are shared by all steps of a history."""
    return {sys.intern(name): float(value) for name, value in stats.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.ndim and not value.is_complex()
    if isinstance(value, np.ndarray | np.generic):
        return not value.ndim and value.dtype.kind in "biuf"
    return isinstance(value, int | float)
