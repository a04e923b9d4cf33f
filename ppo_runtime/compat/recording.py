"""Statistics of a step from its pieces, as ``record_step_stats`` is given them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppo_core.averages import Average
from ppo_runtime.compat import doors
from ppo_runtime.compat.stats import TOKENS
from ppo_runtime.learning.forward import KL_ESTIMATORS
from ppo_runtime.ranks.world import World
from ppo_runtime.reporting.statistics import merged, rollout_parts, var_explained

_RECORDED = "queries", "responses", "scores", "logprobs", "ref_logprobs", "non_score_reward", "masks", "train_stats"


def training_parts(train_stats: Mapping[str, Any]) -> tuple[dict[str, Average], dict[str, Tensor]]:
    """Averages and distributions of stacked minibatch statistics (see ``stack_dicts``), with "ppo/" before the names.

    Minibatches count by their tokens where the statistics tell them. A variance is then the average of those within
    minibatches; that of the whole batch is in what ``step`` returns.
    """
    stats = {key: torch.as_tensor(value).detach().float() for key, value in train_stats.items()}
    tokens = stats.pop(TOKENS, None)
    weights = None if tokens is None else tokens.flatten()
    averages: dict[str, Average] = {}
    distributions: dict[str, Tensor] = {}
    for key, value in stats.items():
        entries = value.flatten()
        if key == "policy/advantages":
            distributions[f"ppo/{key}"] = entries[~entries.isnan()]
            continue
        weight = torch.ones_like(entries) if weights is None else weights.to(entries.device)
        if len(weight) != len(entries):
            raise ValueError(
                f"train_stats[{key!r}] has {len(entries)} entries, expected {len(weight)}, one for each minibatch"
            )
        averages[f"ppo/{key}"] = Average((entries * weight).sum(), weight.sum())
    return averages, distributions


def recorded_stats(kl_coef: Any, data: Mapping[str, Any], kl_penalty: str, world: World) -> dict[str, Any]:
    """Statistics of a step from its pieces, over all ranks; see ``PPOTrainer.record_step_stats``."""
    kl = data.get("kls")
    if kl is None and kl_penalty == "full":
        raise ValueError("kls is missing, which kl_penalty='full' needs; take it from compute_rewards(return_kls=True)")
    doors.entries("record_step_stats", data, _RECORDED)
    doors.floating(
        "non_score_reward", **{name: data[name] for name in ("non_score_reward", "logprobs", "ref_logprobs")}
    )
    mask = doors.token_mask("masks", data["masks"], "non_score_reward", data["non_score_reward"])
    doors.rows_each(len(mask), queries=data["queries"], responses=data["responses"])
    if not isinstance(data["train_stats"], Mapping):
        kind = type(data["train_stats"]).__name__
        raise ValueError(f"train_stats is a {kind}, expected what stack_dicts makes of the minibatches' statistics")
    if not isinstance(kl_coef, int | float):
        raise ValueError(f"kl_coef is a {type(kl_coef).__name__}, expected a number, such as kl_ctl.value")
    if kl is not None:
        doors.floating("non_score_reward", non_score_reward=data["non_score_reward"], kls=kl)
        kl = torch.where(mask, kl.detach(), 0.0)
    else:
        kl = KL_ESTIMATORS[kl_penalty](data["logprobs"], data["ref_logprobs"], mask)
    scores = doors.score_numbers(data["scores"], count=len(mask)).float().to(mask.device)
    parts = rollout_parts(
        torch.where(mask, data["logprobs"].detach(), 0.0),
        torch.where(mask, data["ref_logprobs"].detach(), 0.0),
        kl,
        mask,
        scores=scores,
        non_score_rewards=data["non_score_reward"],
        query_lengths=torch.tensor([len(query) for query in data["queries"]]),
        response_lengths=torch.tensor([len(response) for response in data["responses"]]),
    )
    averages, distributions = training_parts(data["train_stats"])
    parts.metrics.update(averages)
    parts.distributions.update(distributions)
    stats = merged(parts, world) | {"objective/kl_coef": kl_coef}
    if "ppo/val/error" in stats and "ppo/returns/var" in stats:
        stats["ppo/val/var_explained"] = var_explained(stats["ppo/val/error"], stats["ppo/returns/var"])
    return stats
