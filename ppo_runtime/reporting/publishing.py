"""Uploading the best policy of a run."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.common.redact import hide
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.gather import World, global_moments

logger = logging.getLogger(__name__)


class BestPolicyKeeper:
    """Uploads the policy that made the best batch so far, by its mean *raw* score.

    Scaled scores would not do: their scale moves with the run. An upload that fails is a warning, and is tried again
    with the next best batch: training is worth more.

    Args:
        config: for ``push_to_hub_if_best_kwargs``, without which nothing is done, and ``compare_steps``.
        world: the ranks.
    """

    def __init__(self, config: PPOConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.best_score: float | None = None
        """Highest mean raw score of an uploaded batch so far."""

    def __call__(self, raw_scores: Tensor, step: int, upload: Callable[..., Any]) -> None:
        """Compare a batch, before it is trained on; ``upload`` is called with the configured arguments."""
        kwargs = self.config.push_to_hub_if_best_kwargs
        if not kwargs or step % self.config.compare_steps:
            return
        mean = float(global_moments(raw_scores, torch.ones_like(raw_scores, dtype=torch.bool), self.world).mean)
        if self.best_score is not None and mean <= self.best_score:
            return
        try:
            upload(**kwargs)
        except Exception as error:  # of the network, the hub or the disk
            logger.warning(
                "the best policy so far (mean score %.4g) could not be uploaded: %s", mean, hide(str(error), kwargs)
            )
            return
        self.best_score = mean
