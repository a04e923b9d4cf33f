"""What the temporal functions share: arguments are checked, widened, and set to 0 where the mask is False."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ppo_core._checks import (
    check_axis,
    check_boolean,
    check_floating,
    check_same_shape,
    check_without_axis,
    widen,
)
from ppo_core._recurrence import look_ahead
from ppo_core._select import as_numbers, select

PerStep = float | Float[Tensor, "*batch time"]
"""One number for all steps, or one for each."""


class Observed(NamedTuple):
    """The arguments of a temporal function: checked, widened, and 0 wherever the mask is False."""

    rewards: Tensor
    values: Tensor
    kept: Tensor
    bootstrap: Tensor
    gamma: float | Tensor
    lam: float | Tensor


def observe(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor | None, *, gamma: PerStep, lam: PerStep = 1.0
) -> Observed:
    """Check the arguments that all temporal functions share; None as bootstrap is 0."""
    check_floating(rewards=rewards, values=values)
    check_boolean(mask=mask)
    check_axis("time", rewards=rewards)
    check_same_shape("rewards", rewards, values=values, mask=mask)
    bootstrap = what_follows("rewards", rewards, bootstrap=bootstrap)
    rewards, values, bootstrap = widen(rewards, values, bootstrap)
    kept = as_numbers(mask, rewards.dtype)
    return Observed(
        select(kept, rewards),
        select(kept, values),
        kept,
        bootstrap,
        _per_step("gamma", gamma, kept),
        _per_step("lam", lam, kept),
    )


def what_follows(like_name: str, like: Tensor, **after: Tensor | None) -> Tensor:
    """The checked value behind the last step: one number for each sequence of ``like``, 0 when None."""
    ((name, given),) = after.items()
    if given is None:
        return like.new_zeros(like.shape[:-1])
    check_floating(**{name: given})
    check_without_axis("time", like_name, like, **{name: given})
    return given


def _per_step(name: str, x: PerStep, kept: Tensor) -> float | Tensor:
    """A number as it is; a tensor checked and selected."""
    if not isinstance(x, Tensor):
        return x
    check_floating(**{name: x})
    check_same_shape("rewards", kept, **{name: x})
    return select(kept, x.to(kept.dtype))


def chain(seen: Observed, coef: float | Tensor) -> Tensor:
    """The coefficients of a recurrence over kept tokens only: 1 on masked ones."""
    # where(kept, coef, 1) without a branch per entry. Subtracting 1 and adding it again changes a kept entry by at most
    # one rounding of 1, and not at all from 0.5 to 2.
    return ((coef - 1) * seen.kept).add_(1)


def lambda_targets(seen: Observed) -> Tensor:
    """:func:`ppo_core.returns.lambda_returns` of what was checked and selected."""
    toward = torch.lerp(seen.values, seen.rewards, seen.lam)
    return target(seen, look_ahead(toward, chain(seen, seen.gamma * seen.lam), seen.bootstrap))


def target(seen: Observed, ahead: Tensor) -> Tensor:
    """r_t + gamma_t times what lies ahead, and 0 on masked positions."""
    if isinstance(seen.gamma, Tensor):
        return torch.addcmul(seen.rewards, seen.gamma, ahead)
    return torch.addcmul(seen.rewards, seen.kept, ahead, value=seen.gamma)


def earlier(x: Tensor, steps: int, fill: float) -> Tensor:
    """x_{t+steps}, and ``fill`` behind the end."""
    return pad(x[..., steps:], (0, min(steps, x.shape[-1])), value=fill)
