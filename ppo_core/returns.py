"""Targets for a critic: what followed each kept token, discounted. A masked position is deleted from its sequence.

Everywhere, gamma_t discounts the transition after token t, and V_{t+1} is the value at the next *kept* position. After
the last one comes ``bootstrap``: the value of the state in which a sequence was cut off (truncated), or 0 where it came
to its end (terminated), which is what None says of a whole batch. For a batch of both pass
``torch.where(truncated, value_after_the_last_token, 0.0)``.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._recurrence import look_ahead
from ppo_core._select import select
from ppo_core._steps import PerStep, chain, earlier, lambda_targets, observe, target


def reward_to_go(
    rewards: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    bootstrap: Float[Tensor, "*batch"] | None = None,
    *,
    gamma: PerStep,
) -> Float[Tensor, "*batch time"]:
    """G_t = r_t + gamma_t G_{t+1}: the discounted sum of what is still to come (Sutton & Barto, 2018, eq. 3.9).

    Args:
        rewards: r_t, any unit.
        mask: True where a token counts.
        bootstrap: G after the last kept token, in the unit of the rewards; see the module. None: 0.
        gamma: discount per kept token, in [0, 1].

    Returns:
        Same shape and unit as rewards, float32 or wider, 0 on masked positions.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: no time axis; shapes or devices differ.
    """
    seen = observe(rewards, rewards, mask, bootstrap, gamma=gamma)
    return target(seen, look_ahead(seen.rewards, chain(seen, seen.gamma), seen.bootstrap))


def lambda_returns(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    bootstrap: Float[Tensor, "*batch"] | None = None,
    *,
    gamma: PerStep,
    lam: PerStep,
) -> Float[Tensor, "*batch time"]:
    """G_t = r_t + gamma_t ((1 - lam_{t+1}) V_{t+1} + lam_{t+1} G_{t+1}) (Sutton & Barto, 2018, eq. 12.18).

    lam_t belongs to the state before token t: it says how far the return looks past V_t, so that the first one of a
    sequence is never used. Let S_t = V_t + lam_t (G_t - V_t) be what an earlier token sees of t. Then
    S_t = (1 - lam_t) V_t + lam_t r_t + gamma_t lam_t S_{t+1}: one linear recurrence, in which a masked position hands
    on what it was given (coefficient 1, input 0).

    Args:
        rewards: r_t, any unit.
        values: V_t, the critic's value before token t, in the unit of the rewards.
        mask: True where a token counts; holes are deleted.
        bootstrap: value of the state after the last kept token; see the module. None: 0.
        gamma: discount per kept token, in [0, 1].
        lam: 0 gives the one-step target, 1 the reward to go.

    Returns:
        Same shape and unit as rewards, float32 or wider, 0 on masked positions.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: no time axis; shapes or devices differ.

    Differs from rlax, whose ``lambda_`` and values are those of the next state, shifted by one against rewards.
    """
    return lambda_targets(observe(rewards, values, mask, bootstrap, gamma=gamma, lam=lam))


def n_step_returns(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    bootstrap: Float[Tensor, "*batch"] | None = None,
    *,
    gamma: PerStep,
    n: int,
) -> Float[Tensor, "*batch time"]:
    """G_t = r_t + gamma_t (r_{t+1} + ... gamma_{t+n-1} V_{t+n}): n kept rewards, then the critic.

    Sutton & Barto (2018), eq. 7.1. Where fewer than n tokens are left the sum ends with the sequence, in ``bootstrap``.
    n = 1 is the one-step target, n >= time the reward to go. One token is a step y -> r + gamma y, and n of them
    compose by doubling, in O(log n) passes over the kept tokens moved together.

    Args:
        rewards: r_t, any unit.
        values: V_t, the critic's value before token t, in the unit of the rewards.
        mask: True where a token counts; holes are deleted and do not count as steps.
        bootstrap: value of the state after the last kept token; see the module. None: 0.
        gamma: discount per kept token, in [0, 1].
        n: number of steps, at least 1.

    Returns:
        Same shape and unit as rewards, float32 or wider, 0 on masked positions.

    Raises:
        TypeError: a tensor is not floating point, or ``mask`` is not boolean.
        ValueError: no time axis; shapes or devices differ; ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least one step")
    seen = observe(rewards, values, mask, bootstrap, gamma=gamma)
    time = mask.shape[-1]
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    present = mask.gather(-1, order)
    # Behind the last kept token, a step changes nothing and the value is the bootstrap.
    step_x = seen.rewards.gather(-1, order)
    step_c = chain(seen, seen.gamma).gather(-1, order)
    value = torch.where(present, seen.values.gather(-1, order), seen.bootstrap.unsqueeze(-1))
    total, product, done = torch.zeros_like(step_x), torch.ones_like(step_c), 0
    size, left = 1, min(n, time)
    while left:
        if left % 2:
            total = total + product * earlier(step_x, done, 0.0)
            product = product * earlier(step_c, done, 1.0)
            done += size
        left //= 2
        if left:
            step_x, step_c = step_x + step_c * earlier(step_x, size, 0.0), step_c * earlier(step_c, size, 1.0)
            size *= 2
    after = torch.cat((value[..., done:], seen.bootstrap.unsqueeze(-1).expand_as(value[..., :done])), dim=-1)
    compact = total + product * after
    rank = (mask.cumsum(-1) - 1).clamp(min=0)
    return select(seen.kept, compact.gather(-1, rank))
