"""Losses whose *gradient* is that of KL(policy || reference), for samples from the policy.

An estimator of a value need not be one of a gradient, since the samples depend on the policy too. Averaged over samples
y from the policy, with d = log pi(y) - log ref(y):

=====================  ============================  =========================================================
loss                   expected gradient             note
=====================  ============================  =========================================================
k1, d                  0                             does nothing but add noise
k3, exp(-d) - 1 + d    grad KL(ref || pi)            the other direction: covers modes instead of seeking them
k2, d^2 / 2            grad KL(pi || ref)            on policy
ratio * k1             grad KL(pi || ref)            off policy too: ratio = pi / the policy that sampled
k3 with k2's gradient  grad KL(pi || ref)            on policy; reports a non-negative, unbiased value
=====================  ============================  =========================================================

Each row is proved by enumeration in the tests. For the estimators as values see :mod:`ppo_core.kl`. All are per-token
terms: summed over a sequence's tokens they give the gradient of each token's KL, not that of later tokens through the
states that this one leads to; a KL penalty inside the reward (:mod:`ppo_core.rewards`) has both. Sources: Schulman,
"Approximating KL Divergence" (2020); Tang & Munos, "On a few pitfalls in KL divergence gradient estimation for RL"
(2025). TRL's GRPO trainer and verl's default put k3 into the loss as it is.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core import kl
from ppo_core._checks import check_floating, check_same_shape
from ppo_core.averages import Average, average


def k2_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Average:
    """(log pi - log ref)^2 / 2 as a loss: its gradient is d * grad log pi, of which grad KL(pi || ref) is the mean.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy being trained, nats. Gets the gradient.
        ref_logprobs: the same under the reference; detached.
        mask: True where a response token counts.

    Returns:
        Total over the kept tokens and their number. The value is biased as an estimate of KL; >= 0.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    check_floating(ref_logprobs=ref_logprobs)
    return average(kl.k2(logprobs, ref_logprobs.detach(), mask), mask)


def weighted_k1_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Average:
    """pi / pi_old * (log pi - log ref) as a loss: unbiased in value and in gradient, off policy too.

    The mean over samples from pi_old is KL(pi || ref) itself, as a function of pi; hence also its gradient. The ratio
    is not clipped: far off policy the variance grows.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy being trained, nats. Gets the gradient.
        old_logprobs: the same under the policy that sampled; detached.
        ref_logprobs: the same under the reference; detached.
        mask: True where a response token counts.

    Returns:
        Total over the kept tokens and their number. The value can have any sign.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    check_floating(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    check_same_shape("logprobs", logprobs, old_logprobs=old_logprobs)
    ratio = kl.k1(logprobs, old_logprobs.detach(), mask).exp()
    return average(ratio * kl.k1(logprobs, ref_logprobs.detach(), mask), mask)


def k3_surrogate(
    logprobs: Float[Tensor, "*batch time"],
    ref_logprobs: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Average:
    """The value of k3 with the gradient of k2, straight through: k2 + (k3 - k2) without gradient.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy being trained, nats. Gets the gradient.
        ref_logprobs: the same under the reference; detached.
        mask: True where a response token counts.

    Returns:
        Total over the kept tokens and their number; >= 0, and unbiased as an estimate of KL(pi || ref).

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    check_floating(ref_logprobs=ref_logprobs)
    ref_logprobs = ref_logprobs.detach()
    gradient = kl.k2(logprobs, ref_logprobs, mask)
    value = kl.k3(logprobs.detach(), ref_logprobs, mask)
    # Only the difference of a term with itself: the value is exactly k3, whatever the size of k2.
    return average(value + (gradient - gradient.detach()), mask)
