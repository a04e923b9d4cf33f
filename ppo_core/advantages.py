"""Advantage estimators. Each is one function of what was observed; a masked position is deleted from its sequence."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_axis, check_floating, widen
from ppo_core._steps import PerStep, lambda_targets, observe


class Advantages(NamedTuple):
    """Advantages and the critic's regression targets, both [*batch, time] in the unit of the rewards."""

    advantages: Float[Tensor, "*batch time"]
    returns: Float[Tensor, "*batch time"]


def gae(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    bootstrap: Float[Tensor, "*batch"] | None = None,
    *,
    gamma: PerStep,
    lam: PerStep,
) -> Advantages:
    """Generalised advantage estimation, A_t = sum_l (gamma lam)^l delta_{t+l}, returns_t = A_t + V_t.

    delta_t = r_t + gamma V_{t+1} - V_t, where t+1 is the next *kept* position. Schulman et al., "High-Dimensional
    Continuous Control Using Generalized Advantage Estimation" (2015), eq. 11 to 16.

    The advantage is how much better than V_t the lambda return is: this is :func:`ppo_core.returns.lambda_returns`,
    where the recurrence is explained, minus the values.

    Args:
        rewards: r_t, from :func:`ppo_core.rewards.compute_rewards`.
        values: V_t, the critic's value before token t.
        mask: True where a token counts; holes (tool output, padding inside) are deleted, not zero-filled.
        bootstrap: value of the state after the last kept token, for sequences that were cut off. None: they
            terminated, and nothing follows.
        gamma: discount per kept token, in [0, 1]; one number, or one for each transition t -> t+1.
        lam: 0 gives the one-step TD error, 1 the return minus the value. One number, or one for each state: lam_t
            says how far an earlier token looks past V_t.

    Returns:
        Advantages, float32 or wider, 0 on masked positions.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: no time axis; shapes or devices differ.

    Differs from TRL, which zero-fills a hole and so lets it break the chain: r = [0, ., 1], V = [.2, 9, .4],
    lam = .5 gives A_0 = .15 there and .50 here, which is the value without the hole.
    """
    seen = observe(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    returns = lambda_targets(seen)
    return Advantages(returns - seen.values, returns)


def rloo(scores: Float[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """A_i = r_i - mean of the other scores of the group: REINFORCE, leave-one-out.

    Kool, van Hoof & Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019), eq. 8; for language models,
    Ahmadian et al., "Back to Basics" (2024), section 3.2. Computed as G / (G - 1) (r_i - mean), which is the same. The
    baseline ignores its own sample, and so leaves the gradient unbiased.

    Args:
        scores: one score per response, the responses to one prompt along the last axis.

    Returns:
        Same shape and unit, float32 or wider. A group of one has nothing to be compared with: 0.

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: ``scores`` has no axes.
    """
    centred = _centred(scores)
    size = scores.shape[-1]
    return centred * (size / max(size - 1, 1))


def grpo(
    scores: Float[Tensor, "*batch group"], *, scale_by_std: bool, correction: int, eps: float
) -> Float[Tensor, "*batch group"]:
    """A_i = (r_i - mean) / (std + eps) over the group.

    Shao et al., "DeepSeekMath" (2024), section 4.1.2. Mean and deviation are taken in two passes: the one-pass variance
    of {10000, 10001} cancels in float32 and gives +-500 (verl) where +-0.707 is right.

    Args:
        scores: one score per response, the responses to one prompt along the last axis.
        scale_by_std: False leaves the unit of the scores, as in "Dr. GRPO" (Liu et al., "Understanding R1-Zero-Like
            Training", 2025): dividing by the deviation favours questions on which nearly all answers agree.
        correction: 1 divides the variance by G - 1 (TRL, verl, OpenRLHF), 0 by G.
        eps: added to the deviation, in the unit of the scores: 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF.

    Returns:
        Same shape, float32 or wider; dimensionless, or in the unit of the scores. A group of one, or of equal scores,
        gives 0 (other systems give the raw score, 0 or NaN).

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: ``scores`` has no axes.
    """
    centred = _centred(scores)
    if not scale_by_std:
        return centred
    spread = centred.square().sum(-1, keepdim=True) / max(scores.shape[-1] - correction, 1)
    # The root has no derivative at 0: a group without spread, whose deviations are 0, is divided by something else.
    return centred / (torch.where(spread > 0, spread, 1.0).sqrt() + eps)


def _centred(scores: Tensor) -> Tensor:
    check_floating(scores=scores)
    check_axis("group", scores=scores)
    (scores,) = widen(scores)
    # The second mean removes what rounding left of a large offset.
    centred = scores - scores.mean(-1, keepdim=True)
    return centred - centred.mean(-1, keepdim=True)
