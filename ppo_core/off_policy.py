"""Off-policy correction: targets for the present policy from samples of an earlier one."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_floating, check_same_shape, widen
from ppo_core._recurrence import look_ahead
from ppo_core._select import select
from ppo_core._steps import PerStep, chain, observe


class VTrace(NamedTuple):
    """Off-policy targets for both losses, [*batch, time] in the unit of the rewards."""

    advantages: Float[Tensor, "*batch time"]
    """rho_t (r_t + gamma_t v_{t+1} - V_t), for the policy gradient."""
    returns: Float[Tensor, "*batch time"]
    """v_t, for the critic."""


def vtrace(
    logprobs: Float[Tensor, "*batch time"],
    old_logprobs: Float[Tensor, "*batch time"],
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    bootstrap: Float[Tensor, "*batch"] | None = None,
    *,
    gamma: PerStep,
    lam: PerStep,
    rho_clip: float,
    c_clip: float,
) -> VTrace:
    """v_t = V_t + rho_t (r_t + gamma_t V_{t+1} - V_t) + gamma_t c_t (v_{t+1} - V_{t+1}).

    rho_t = min(rho_clip, ratio_t), c_t = lam_t min(c_clip, ratio_t) with ratio_t = exp(logprobs_t - old_logprobs_t).
    Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures" (2018),
    eq. 1 and remarks 1 and 2; the advantages are those of section 4.2. With ratios of 1, no clipping and one lam for
    all steps, v_t is :func:`ppo_core.returns.lambda_returns`. As in the paper, a lam per step weighs t -> t+1 (there:
    lam_t belongs to the state t, and weighs t-1 -> t).

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy to evaluate, nats. Taken as given: no
            gradient passes through the ratios.
        old_logprobs: the same under the policy that sampled.
        rewards: r_t, any unit.
        values: V_t, the critic's value before token t, in the unit of the rewards.
        mask: True where a token counts; holes are deleted.
        bootstrap: value of the state after the last kept token; see :mod:`ppo_core.returns`. None: 0.
        gamma: discount per kept token, in [0, 1].
        lam: shortens the traces; 1 in the paper's experiments.
        rho_clip: decides which policy is evaluated: infinity the current one, near 0 the one that sampled.
        c_clip: bounds the variance of the traces, at most ``rho_clip`` for convergence.

    Returns:
        Float32 or wider, 0 on masked positions.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: no time axis; shapes or devices differ.
    """
    check_floating(logprobs=logprobs, old_logprobs=old_logprobs, rewards=rewards)
    check_same_shape("rewards", rewards, logprobs=logprobs, old_logprobs=old_logprobs)
    seen = observe(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    new, old, _ = widen(logprobs.detach(), old_logprobs.detach(), seen.rewards)
    ratio = (select(seen.kept, new) - select(seen.kept, old)).exp()
    rho, c = ratio.clamp(max=rho_clip), seen.lam * ratio.clamp(max=c_clip)
    # V at the next kept position: a kept one stops the recurrence, a masked one hands on.
    next_value = look_ahead(seen.values, 1 - seen.kept, seen.bootstrap)
    error = select(seen.kept, rho * (seen.rewards + seen.gamma * next_value - seen.values))
    links = chain(seen, seen.gamma * c)
    next_correction = look_ahead(error, links, torch.zeros_like(seen.bootstrap))
    next_target = next_value + next_correction
    return VTrace(
        advantages=select(seen.kept, rho * (seen.rewards + seen.gamma * next_target - seen.values)),
        returns=select(seen.kept, torch.addcmul(seen.values + error, links, next_correction)),
    )
