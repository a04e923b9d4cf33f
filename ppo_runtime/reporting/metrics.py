"""Every statistic of a step: its unit and what it is an average over, in one table."""

from collections.abc import Mapping

import attrs


@attrs.frozen
class Metric:
    """What a number means."""

    unit: str
    over: str
    """The denominator of an average, or what else the number is."""


_TOKEN = "kept response tokens of the batch"
_UPDATE = "kept response tokens of every minibatch of the step"
_SEQUENCE = "sequences of the batch"
_DISTRIBUTION = "one entry for each kept response token"

METRICS: Mapping[str, Metric] = {
    "objective/kl": Metric("nats per sequence", f"{_SEQUENCE}; the sum of the KL estimate over a response"),
    "objective/kl_dist": Metric("nats per sequence", "one entry for each sequence"),
    "objective/logprobs": Metric("nats", _DISTRIBUTION),
    "objective/ref_logprobs": Metric("nats", _DISTRIBUTION),
    "objective/kl_coef": Metric("score per nat", "the coefficient this step was trained with"),
    "objective/entropy": Metric("nats per sequence", f"{_SEQUENCE}; the sum of -log pi of the sampled tokens"),
    "ppo/mean_non_score_reward": Metric("score per token", _TOKEN),
    "ppo/mean_scores": Metric("score", f"{_SEQUENCE}, after scaling and clipping"),
    "ppo/std_scores": Metric("score", f"{_SEQUENCE}, after scaling and clipping; Bessel"),
    "ppo/learning_rate": Metric("1", "the optimiser's first parameter group, during this step"),
    "ppo/loss/policy": Metric("whitened advantage", _UPDATE),
    "ppo/loss/value": Metric("score^2", _UPDATE),
    "ppo/loss/total": Metric("1", "policy + vf_coef * value"),
    "ppo/policy/entropy": Metric("nats per token", _UPDATE),
    "ppo/policy/approxkl": Metric("nats per token", f"{_UPDATE}; k2 from the rollout's policy"),
    "ppo/policy/policykl": Metric("nats per token", f"{_UPDATE}; k1 from the rollout's policy"),
    "ppo/policy/clipfrac": Metric("share", _UPDATE),
    "ppo/policy/advantages": Metric("whitened", _DISTRIBUTION),
    "ppo/policy/advantages_mean": Metric("score", f"{_TOKEN}; before whitening"),
    "ppo/policy/ratio": Metric("1", f"{_UPDATE}; pi / pi_old"),
    "ppo/policy/first_minibatch_ratio_deviation": Metric("1", "max |pi / pi_old - 1| before the first update"),
    "ppo/policy/grad_norm": Metric("1", "optimiser steps; before clipping"),
    "ppo/policy/skipped_updates": Metric("updates", "left out: beyond ratio_threshold, not finite, or no kept token"),
    "ppo/policy/epochs": Metric("epochs", "begun in this step; fewer than ppo_epochs after an early stop"),
    "ppo/returns/mean": Metric("score", _TOKEN),
    "ppo/returns/var": Metric("score^2", f"{_TOKEN}; Bessel"),
    "ppo/val/vpred": Metric("score", _UPDATE),
    "ppo/val/error": Metric("score^2", f"{_UPDATE}; without clipping"),
    "ppo/val/clipfrac": Metric("share", _UPDATE),
    "ppo/val/mean": Metric("score", f"{_TOKEN}; the rollout's values"),
    "ppo/val/var": Metric("score^2", f"{_TOKEN}; the rollout's values, Bessel"),
    "ppo/val/var_explained": Metric("share", "1 - val/error / returns/var; 0 where the returns do not vary"),
    "tokens/queries_len_mean": Metric("tokens", _SEQUENCE),
    "tokens/queries_len_std": Metric("tokens", f"{_SEQUENCE}; Bessel"),
    "tokens/queries_dist": Metric("tokens", "one entry for each sequence"),
    "tokens/responses_len_mean": Metric("tokens", _SEQUENCE),
    "tokens/responses_len_std": Metric("tokens", f"{_SEQUENCE}; Bessel"),
    "tokens/responses_dist": Metric("tokens", "one entry for each sequence"),
    "time/ppo/forward_pass": Metric("s", "on rank 0"),
    "time/ppo/compute_rewards": Metric("s", "on rank 0"),
    "time/ppo/compute_advantages": Metric("s", "on rank 0"),
    "time/ppo/optimize_step": Metric("s", "on rank 0"),
    "time/ppo/calc_stats": Metric("s", "on rank 0"),
    "time/ppo/total": Metric("s", "on rank 0"),
}
