"""Advantage estimators. Each is one function of what was observed; a masked position is deleted from its sequence."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import (
    check_boolean,
    check_floating,
    check_same_device,
    check_same_shape,
    check_shape,
    check_time_axis,
    widen,
)
from ppo_core.scan import linear_recurrence


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
    gamma: float,
    lam: float,
) -> Advantages:
    """Generalised advantage estimation, A_t = sum_l (gamma lam)^l delta_{t+l}, returns_t = A_t + V_t.

    delta_t = r_t + gamma V_{t+1} - V_t, where t+1 is the next *kept* position. Schulman et al., "High-Dimensional
    Continuous Control Using Generalized Advantage Estimation" (2015), eq. 11 to 16.

    Let S_t = V_t + lam A_t be what an earlier token sees of t. Then A_t = r_t - V_t + gamma S_{t+1}, so that
    S_t = (1 - lam) V_t + lam r_t + gamma lam S_{t+1}: one linear recurrence, in which a masked position hands on what
    it was given (coefficient 1, input 0).

    Args:
        rewards: r_t, from :func:`ppo_core.rewards.compute_rewards`.
        values: V_t, the critic's value before token t.
        mask: True where a token counts; holes (tool output, padding inside) are deleted, not zero-filled.
        bootstrap: value of the state after the last kept token, for sequences that were cut off. None: they
            terminated, and nothing follows.
        gamma: discount per kept token, in [0, 1].
        lam: 0 gives the one-step TD error, 1 the return minus the value.

    Returns:
        Advantages, float32 or wider, 0 on masked positions.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: no time axis; shapes or devices differ.

    Differs from TRL, which zero-fills a hole and so lets it break the chain: r = [0, ., 1], V = [.2, 9, .4],
    lam = .5 gives A_0 = .15 there and .50 here, which is the value without the hole.
    """
    check_floating(rewards=rewards, values=values)
    check_boolean(mask=mask)
    check_time_axis(rewards=rewards)
    check_same_shape("rewards", rewards, values=values, mask=mask)
    if bootstrap is None:
        bootstrap = rewards.new_zeros(rewards.shape[:-1])
    check_floating(bootstrap=bootstrap)
    check_shape("rewards without its time axis", tuple(rewards.shape[:-1]), bootstrap=bootstrap)
    check_same_device("rewards", rewards, bootstrap=bootstrap)
    rewards, values, bootstrap = widen(rewards, values, bootstrap)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)

    seen = linear_recurrence(
        torch.where(mask, values + lam * (rewards - values), 0.0),
        # Filled, not selected: where() of two Python numbers would round the coefficient to float32.
        torch.ones_like(values).masked_fill(mask, gamma * lam),
        bootstrap,
    )
    seen_next = torch.cat((seen[..., 1:], bootstrap.unsqueeze(-1)), dim=-1)[..., : seen.shape[-1]]
    advantages = torch.where(mask, rewards - values + gamma * seen_next, 0.0)
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))
