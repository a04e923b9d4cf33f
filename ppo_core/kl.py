"""Estimators of KL(policy || reference) per token, in nats.

Write d = log pi(y_t | .) - log ref(y_t | .) for the sampled token. Averaged over samples from the policy:

====  =====================  ========  ============  ======================================================
k1    d                      unbiased  any sign      what the adaptive controller and J = E[score] - coef KL mean
abs   |d|                    biased    >= 0          ``kl_penalty='abs'``
k2    d^2 / 2                biased    >= 0          ``kl_penalty='mse'``
k3    exp(-d) - 1 + d        unbiased  >= 0          low variance near equality
full  sum_v pi_v (d_v)       exact     >= 0          needs both distributions
====  =====================  ========  ============  ======================================================

Source: Schulman, "Approximating KL Divergence" (2020), for k1, k2, k3. These are estimators of a *value*, to be used
inside a reward, where no gradient passes: as losses, k1 has zero expected gradient and k3 descends the other
direction of KL. Masked positions are 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_boolean, check_floating, check_same_shape, check_without_axis, widen


def k1(
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """log pi - log ref (``kl_penalty='kl'``). Raises as :func:`ppo_core.masking.keep`."""
    return _log_ratio(logprobs, ref_logprobs, mask)


def kl_abs(
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """abs(log pi - log ref) (``kl_penalty='abs'``). Raises as :func:`ppo_core.masking.keep`."""
    return _log_ratio(logprobs, ref_logprobs, mask).abs()


def k2(
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """(log pi - log ref)^2 / 2 (``kl_penalty='mse'``). Raises as :func:`ppo_core.masking.keep`."""
    return 0.5 * _log_ratio(logprobs, ref_logprobs, mask).square()


def k3(
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """ref/pi - 1 - log(ref/pi). Raises as :func:`ppo_core.masking.keep`."""
    d = _log_ratio(logprobs, ref_logprobs, mask)
    return torch.expm1(-d) + d


def full(
    logprobs: Float[Tensor, "*batch time vocab"],
    ref_logprobs: Float[Tensor, "*batch time vocab"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """sum_v pi_v (log pi_v - log ref_v) over the whole vocabulary (``kl_penalty='full'``).

    Both arguments are normalised log-probabilities of every token. A token the policy rules out (-inf) adds 0; one
    that only the reference rules out makes the divergence infinite, as it is. TRL passes (ref, policy) to ``kl_div``,
    an order that is easily reversed: here the expectation is under the policy.

    Raises:
        TypeError: a distribution is not floating point or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    check_floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_boolean(mask=mask)
    check_same_shape("logprobs", logprobs, ref_logprobs=ref_logprobs)
    check_without_axis("vocab", "logprobs", logprobs, mask=mask)
    logprobs, ref_logprobs = widen(logprobs, ref_logprobs)
    counts = mask.unsqueeze(-1) & ~torch.isneginf(torch.where(mask.unsqueeze(-1), logprobs, 0.0))
    policy = torch.where(counts, logprobs, 0.0)
    terms = policy.exp() * (policy - torch.where(counts, ref_logprobs, 0.0))
    return torch.where(counts, terms, 0.0).sum(-1)


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    check_floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_boolean(mask=mask)
    check_same_shape("logprobs", logprobs, ref_logprobs=ref_logprobs, mask=mask)
    logprobs, ref_logprobs = widen(logprobs, ref_logprobs)
    # Each side is selected before the difference: inf - inf under the mask would be NaN in the backward pass.
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, ref_logprobs, 0.0)
