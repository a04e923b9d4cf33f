"""Advantages and returns of a batch: the core's estimator, with moments merged over all ranks."""

from typing import NamedTuple

from torch import Tensor

from ppo_core.advantages import gae
from ppo_core.whitening import whiten
from ppo_runtime.config import PPOConfig
from ppo_runtime.distributed import World
from ppo_runtime.statistics import global_moments

WHITENING_EPS = 1e-8


class Estimates(NamedTuple):
    """What the update trains towards, each [B, T] and 0 where nothing counts."""

    raw_advantages: Tensor
    advantages: Tensor
    """Whitened over all ranks."""
    returns: Tensor


def estimate(rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig, world: World) -> Estimates:
    """GAE of the rewards, which are whitened first (their mean kept) if ``whiten_rewards``."""
    if config.whiten_rewards:
        rewards = globally_whitened(rewards, mask, world, shift_mean=False)
    found = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    return Estimates(found.advantages, globally_whitened(found.advantages, mask, world, shift_mean=True), found.returns)


def globally_whitened(x: Tensor, mask: Tensor, world: World, *, shift_mean: bool) -> Tensor:
    """Whitened by the moments of all ranks' kept entries."""
    moments = global_moments(x, mask, world)
    return whiten(x, mask, moments, shift_mean=shift_mean, correction=1, eps=WHITENING_EPS)
