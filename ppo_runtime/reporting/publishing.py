"""Uploading the best policy of a run."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.common.redact import hide
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.agreement import agree_any
from ppo_runtime.ranks.gather import global_moments
from ppo_runtime.ranks.world import World

logger = logging.getLogger(__name__)


def upload_if_best(
    raw_scores: Tensor,
    best_score: float | None,
    step: int,
    upload: Callable[..., Any],
    *,
    config: PPOConfig,
    world: World,
) -> float | None:
    """Upload the policy if it made the best batch so far, by the mean *raw* score; gives the best mean from now on.

    Scaled scores would not do: their scale moves with the run. An upload that fails is a warning, and is tried again
    with the next best batch: training is worth more.

    Args:
        raw_scores: [B] of a batch that is not yet trained on.
        best_score: mean of the best batch whose policy was uploaded; None before there is one.
        step: steps done.
        upload: is called with the configured arguments.
        config: for ``push_to_hub_if_best_kwargs``, without which nothing is done, and ``compare_steps``.
        world: the ranks.
    """
    kwargs = config.push_to_hub_if_best_kwargs
    if not kwargs or step % config.compare_steps:
        return best_score
    mean = float(global_moments(raw_scores, torch.ones_like(raw_scores, dtype=torch.bool), world).mean)
    if best_score is not None and mean <= best_score:
        return best_score
    failed = False
    try:
        upload(**kwargs)
    except Exception as error:  # of the network, the hub or the disk
        failed = True
        logger.warning(
            "the best policy so far (mean score %.4g) could not be uploaded: %s", mean, hide(str(error), kwargs)
        )
    # One rank uploads, and all go on with the same best score.
    return best_score if agree_any(failed, world, "the upload of the best policy") else mean
