"""PPO's two clipped objectives, as (total, weight) over tokens.

Whatever plays the part of a target (old log-probabilities, advantages, old values, returns) is detached here, so that
no caller can leak a gradient through it. Divide once, at the end: :func:`ppo_core.mean_of`, or
``loss.total / global_weight`` under accumulation and across ranks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_boolean, check_floating, check_same_shape, widen
from ppo_core.averages import Average, average


class PolicyLoss(NamedTuple):
    """The objective to minimise and its diagnostics, each an average over kept tokens."""

    loss: Average
    clip_fraction: Average
    """Share of tokens on which the clipped branch is the worse one, and so the one that counts."""
    approx_kl: Average
    """(log pi - log pi_old)^2 / 2 in nats: k2 of the update so far."""
    policy_kl: Average
    """log pi_old - log pi in nats: k1 of KL(pi_old || pi), unbiased on the rollout's samples."""
    ratio: Average
    """pi / pi_old."""
    ratio_deviation: Float[Tensor, ""]
    """max |pi / pi_old - 1| over kept tokens: must be 0 (up to rounding) before the first update."""


class ValueLoss(NamedTuple):
    """The critic's objective and its diagnostics, each an average over kept tokens."""

    loss: Average
    clip_fraction: Average
    """Share of tokens on which the clipped branch is the worse one."""
    error: Average
    """(V - return)^2, without clipping and without the factor 1/2."""


def clipped_policy_loss(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    advantages: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    cliprange: float,
) -> PolicyLoss:
    """max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange)) with ratio = exp(logprobs - old_logprobs).

    Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7, negated. At ratio 1 the gradient by
    the log-probability is -A; past the clip on the improving side it is exactly 0.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy being trained, nats. Gets the gradient.
        old_logprobs: the same under the policy that sampled, at the same temperature.
        advantages: A_t, usually whitened.
        mask: True where a response token counts.
        cliprange: epsilon > 0, dimensionless.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    check_floating(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_boolean(mask=mask)
    check_same_shape("logprobs", logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    logprobs, old_logprobs, advantages = widen(logprobs, old_logprobs.detach(), advantages.detach())
    # Each side is selected before the difference and the exponential: an inf under the mask would come back as NaN
    # through the backward pass of exp, even though its value was thrown away.
    log_ratio = torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    moved = log_ratio.detach()
    deviation = torch.where(mask, torch.expm1(moved).abs(), 0.0)
    return PolicyLoss(
        loss=average(torch.maximum(plain, clipped), mask),
        clip_fraction=average((clipped > plain).to(plain.dtype), mask),
        approx_kl=average(0.5 * moved.square(), mask),
        policy_kl=average(-moved, mask),
        ratio=average(ratio.detach(), mask),
        ratio_deviation=deviation.amax() if deviation.numel() else deviation.sum(),
    )


def clipped_value_loss(
    values: Float[Tensor, "*batch time"],
    old_values: Float[Tensor, "*batch time"],
    returns: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    cliprange: float,
) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old - cliprange, V_old + cliprange) - R)^2).

    The clipped value function of OpenAI's baselines (ppo2), adopted by lm-human-preferences; it is anchored at the old
    values, not at the returns.

    Args:
        values: V_t of the critic being trained. Gets the gradient.
        old_values: V_t when the rollout was scored.
        returns: regression targets, from :func:`ppo_core.advantages.gae`.
        mask: True where a response token counts.
        cliprange: in the unit of the values; not scale-free.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    check_floating(values=values, old_values=old_values, returns=returns)
    check_boolean(mask=mask)
    check_same_shape("values", values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = widen(values, old_values.detach(), returns.detach())
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns).square()
    clipped = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
    return ValueLoss(
        loss=average(0.5 * torch.maximum(plain, clipped), mask),
        clip_fraction=average((clipped > plain).to(plain.dtype), mask),
        error=average(plain.detach(), mask),
    )
