"""Advantages and returns of a batch: an estimator of the core's, with moments merged over all ranks."""

from typing import Protocol

from torch import Tensor

from ppo_core.advantages import Advantages, gae
from ppo_core.whitening import whiten
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.gather import World, global_moments

WHITENING_EPS = 1e-8


class AdvantageEstimator(Protocol):
    """From rewards and values to advantages and the critic's targets, each [B, T] and 0 where the mask is."""

    def __call__(self, rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig) -> Advantages:
        """Of a whole batch."""
        ...


def gae_estimator(rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig) -> Advantages:
    """Generalised advantage estimation at the configuration's ``gamma`` and ``lam``."""
    return gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)


def globally_whitened(x: Tensor, mask: Tensor, world: World, *, shift_mean: bool) -> Tensor:
    """Whitened by the moments of all ranks' kept entries."""
    moments = global_moments(x, mask, world)
    return whiten(x, mask, moments, shift_mean=shift_mean, correction=1, eps=WHITENING_EPS)
