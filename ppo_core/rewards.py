"""From one score per sequence and one KL per token to one reward per token."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import (
    check_boolean,
    check_floating,
    check_number,
    check_same_device,
    check_same_shape,
    check_without_axis,
    widen,
)
from ppo_core.masking import keep, last_kept


class Rewards(NamedTuple):
    """Per-token rewards and the part of them that is not the score, both [*batch, time]."""

    rewards: Float[Tensor, "*batch time"]
    non_score_rewards: Float[Tensor, "*batch time"]


def compute_rewards(
    scores: Float[Tensor, "*batch"],
    kl: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    kl_coef: float | Float[Tensor, ""],
) -> Rewards:
    """reward_t = -kl_coef * kl_t, plus the score on the last kept token.

    With gamma = 1 and ``kl`` the k1 estimate, the return of a sequence is score - kl_coef * log(pi/ref): PPO then
    maximises E[score] - kl_coef * KL(pi || ref). Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
    (2019), eq. 2.

    Args:
        scores: one score per sequence, in the reward model's unit.
        kl: per-token KL estimates in nats, from :mod:`ppo_core.kl`.
        mask: True where a response token counts. A sequence without any gets no reward at all.
        kl_coef: score units per nat.

    Returns:
        Rewards, float32 or wider, 0 on masked positions. Each row of ``rewards`` sums to
        score - kl_coef * sum(kl), as long as one token is kept.

    Raises:
        TypeError: ``scores``, ``kl`` or ``kl_coef`` is not floating point, or ``mask`` is not boolean.
        ValueError: ``kl`` has no time axis, shapes disagree, devices differ, ``kl_coef`` is not one number.
    """
    check_floating(scores=scores, kl=kl)
    check_boolean(mask=mask)
    check_same_shape("kl", kl, mask=mask)
    check_without_axis("time", "kl", kl, scores=scores)
    if isinstance(kl_coef, Tensor):
        check_number(kl_coef=kl_coef)
        check_same_device("kl", kl, kl_coef=kl_coef)
    scores, kl = widen(scores, kl)
    penalty = -kl_coef * keep(kl, mask)
    score = keep(scores.unsqueeze(-1).expand_as(kl), last_kept(mask))
    return Rewards(penalty + score, penalty)
