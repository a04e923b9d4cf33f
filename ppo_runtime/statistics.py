"""From tensors of a step to the dictionary of statistics, equal on every rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppo_core.averages import Average, average, mean_of
from ppo_core.moments import Moments, masked_moments, variance
from ppo_runtime.distributed import Maximum, World, gather_averages, gather_rows, merge_moments
from ppo_runtime.forward import Rows, Scored
from ppo_runtime.update import Outcome


def global_moments(x: Tensor, mask: Tensor, world: World) -> Moments:
    """Moments of the kept entries over all ranks."""
    return merge_moments(masked_moments(x, mask), world)


def step_statistics(
    *,
    rows: Rows,
    scored: Scored,
    scores: Tensor,
    non_score_rewards: Tensor,
    raw_advantages: Tensor,
    advantages: Tensor,
    returns: Tensor,
    query_lengths: Tensor,
    response_lengths: Tensor,
    outcome: Outcome,
    kl_coef: float,
    learning_rate: float,
    vf_coef: float,
    world: World,
) -> dict[str, Any]:
    """All statistics of :data:`ppo_runtime.metrics.METRICS` but the timings.

    Averages travel as (total, weight) in one collective; distributions are gathered entry by entry.
    """
    mask = rows.mask
    every = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    kl_per_sequence = scored.kl.sum(-1)
    metrics: dict[str, Average | Maximum] = {
        **outcome.averages,
        "ppo/policy/first_minibatch_ratio_deviation": Maximum(outcome.first_ratio_deviation),
        "objective/kl": average(kl_per_sequence, every),
        "objective/entropy": average(-scored.logprobs.sum(-1), every),
        "ppo/mean_non_score_reward": average(non_score_rewards, mask),
        "ppo/policy/advantages_mean": average(raw_advantages, mask),
    }
    stats: dict[str, Any] = {
        name: float(metric.value if isinstance(metric, Maximum) else mean_of(metric))
        for name, metric in gather_averages(metrics, world).items()
    }
    for name, (x, kept) in {
        "ppo/{}_scores": (scores, every),
        "ppo/returns/{}": (returns, mask),
        "ppo/val/{}": (scored.values, mask),
        "tokens/queries_len_{}": (query_lengths, every),
        "tokens/responses_len_{}": (response_lengths, every),
    }.items():
        moments = global_moments(x.to(mask.device).float(), kept, world)
        spread = variance(moments, correction=1)
        stats[name.format("mean")] = float(moments.mean)
        if name.startswith(("ppo/returns", "ppo/val")):
            stats[name.format("var")] = float(spread)
        else:
            stats[name.format("std")] = float(spread.sqrt())
    for name, values in {
        "objective/kl_dist": kl_per_sequence,
        "objective/logprobs": scored.logprobs[mask],
        "objective/ref_logprobs": scored.ref_logprobs[mask],
        "ppo/policy/advantages": advantages[mask],
        "tokens/queries_dist": query_lengths.float(),
        "tokens/responses_dist": response_lengths.float(),
    }.items():
        stats[name] = gather_rows(values, world).cpu().numpy()
    returns_var = stats["ppo/returns/var"]
    stats |= {
        "objective/kl_coef": kl_coef,
        "ppo/learning_rate": learning_rate,
        "ppo/loss/total": stats["ppo/loss/policy"] + vf_coef * stats["ppo/loss/value"],
        "ppo/policy/skipped_updates": outcome.skipped_updates,
        "ppo/policy/epochs": outcome.epochs,
        "ppo/val/var_explained": 1.0 - stats["ppo/val/error"] / returns_var if returns_var > 0 else 0.0,
    }
    stats.setdefault("ppo/policy/grad_norm", 0.0)  # every update was skipped
    return stats


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are single numbers: what a curve can show."""
    return {name: float(value) for name, value in stats.items() if isinstance(value, int | float)}
