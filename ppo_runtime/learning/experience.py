"""A scored batch with its advantages and returns, as one record, made before it is trained on."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_core.moments import Moments, masked_moments
from ppo_core.rewards import Rewards
from ppo_core.whitening import whiten
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.advantages import WHITENING_EPS, AdvantageEstimator, estimated, globally_whitened
from ppo_runtime.learning.forward import Scored
from ppo_runtime.learning.refusals import refuse_unusable
from ppo_runtime.learning.update import Targets
from ppo_runtime.ranks.agreement import all_or_none
from ppo_runtime.ranks.gather import folded_moments, packed_moments
from ppo_runtime.ranks.world import World


class Experience(NamedTuple):
    """A scored batch, each [B, T] and 0 where nothing counts, but for ``scores``; nothing carries a gradient."""

    mask: Tensor
    """Boolean, True on response tokens that count."""
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl: Tensor
    """The penalty's estimate, nats."""
    scores: Tensor
    """[B] as they are rewarded."""
    rewards: Tensor
    non_score_rewards: Tensor
    raw_advantages: Tensor
    advantages: Tensor
    """Whitened over all ranks."""
    returns: Tensor

    @property
    def targets(self) -> Targets:
        """What the update trains towards."""
        return Targets(self.logprobs, self.values, self.advantages, self.returns)


def make_experience(
    scored: Scored,
    scores: Tensor,
    given: Rewards,
    mask: Tensor,
    *,
    estimator: AdvantageEstimator,
    tokens: Tensor,
    config: PPOConfig,
    world: World,
) -> tuple[Experience, Tensor]:
    """Advantages and returns of a rewarded batch, and the tokens of every update over all ranks.

    One collective, and one more with ``whiten_rewards``.

    Args:
        scored: what policy and reference say of it.
        scores: [B] as they are rewarded.
        given: the rewards that are made of both.
        mask: [B, T] boolean.
        estimator: of the advantages; they are whitened afterwards.
        tokens: [updates] kept tokens of every update on this rank, equally many on every rank.
        config: for the estimator.
        world: the ranks.

    Raises:
        ValueError: (on all ranks) the batch cannot be trained on, by sequence and token.
    """
    rewards = given.rewards
    if config.whiten_rewards:
        rewards = globally_whitened(rewards, mask, world, shift_mean=False)
    with all_or_none(world, carries=len(Moments._fields) + len(tokens), phase="the check of advantages") as ballot:
        found = estimated(estimator, rewards, scored.values, mask, config=config)
        refuse_unusable(scored, found, given, scores, mask, config, ranks=world.size)
        mine = masked_moments(found.advantages, mask)
        ballot.mine = torch.cat((packed_moments(mine), tokens.double()))
    moments = folded_moments(mine, ballot.all[:, : len(mine)])
    advantages = whiten(found.advantages, mask, moments, shift_mean=True, correction=1, eps=WHITENING_EPS)
    made = Experience(mask, *scored, scores, *given, found.advantages, advantages, found.returns)
    return made, ballot.all[:, len(mine) :].sum(0)
