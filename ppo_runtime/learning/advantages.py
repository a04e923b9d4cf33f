"""Advantages and returns of a batch: an estimator of the core's, with moments merged over all ranks."""

from typing import Protocol

import torch
from torch import Tensor

from ppo_core.advantages import Advantages, gae
from ppo_core.whitening import whiten
from ppo_runtime.config import PPOConfig
from ppo_runtime.ranks.gather import global_moments
from ppo_runtime.ranks.world import World

WHITENING_EPS = 1e-8


class AdvantageEstimator(Protocol):
    """From rewards and values to advantages and the critic's targets, each [B, T] and 0 where the mask is."""

    def __call__(self, rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig) -> Advantages:
        """Of a whole batch."""
        ...


def gae_estimator(rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig) -> Advantages:
    """Generalised advantage estimation at the configuration's ``gamma`` and ``lam``."""
    return gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)


def estimated(
    estimator: AdvantageEstimator, rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig
) -> Advantages:
    """What an estimator gives, checked, 0 where the mask is and without gradient.

    Raises:
        TypeError, ValueError: it is no :class:`ppo_core.advantages.Advantages` of floating-point tensors [B, T].
    """
    found: object = estimator(rewards, values, mask, config=config)
    if not isinstance(found, Advantages):
        raise TypeError(f"advantages= gave a {type(found).__name__}, expected ppo_core.advantages.Advantages")
    for name, x in found._asdict().items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"advantages= gave {name} as a {kind}, expected a tensor of floating-point numbers")
        if x.shape != mask.shape or x.device != mask.device:
            raise ValueError(
                f"advantages= gave {name} of shape {tuple(x.shape)} on {x.device}, expected {tuple(mask.shape)} on "
                f"{mask.device} like rewards"
            )
    return Advantages(*(torch.where(mask, x.detach(), 0.0) for x in found))


def globally_whitened(x: Tensor, mask: Tensor, world: World, *, shift_mean: bool) -> Tensor:
    """Whitened by the moments of all ranks' kept entries."""
    moments = global_moments(x, mask, world)
    return whiten(x, mask, moments, shift_mean=shift_mean, correction=1, eps=WHITENING_EPS)
