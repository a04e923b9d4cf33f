"""The one recurrence behind every temporal function of this package."""

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_core._checks import check_axis, check_floating, check_same_shape, widen
from ppo_core._recurrence import look_ahead
from ppo_core._steps import what_follows


def linear_recurrence(
    x: Float[Tensor, "*batch time"], coef: Float[Tensor, "*batch time"], after: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + coef_t * y_{t+1}, with y = ``after`` (0 when None) behind the end.

    Neighbours compose into one step of the same form, y_t = (x_t + c_t x_{t+1}) + (c_t c_{t+1}) y_{t+2}, so that
    four are taken together until few are left, and then filled in again: O(time) work in O(log time) depth, no loop
    over time and no division (Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4). Exact up to
    rounding for every coefficient, 0 included; its derivatives are recurrences again.

    Args:
        x: inputs, any unit.
        coef: dimensionless coefficients; ``coef_t`` weighs everything after t.
        after: what follows the last step, in the unit of x.

    Returns:
        Same shape and unit as x, float32 or wider. An empty time axis gives an empty result.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: no time axis; shapes or devices differ.
    """
    check_floating(x=x, coef=coef)
    check_axis("time", x=x)
    check_same_shape("x", x, coef=coef)
    after = what_follows("x", x, after=after)
    x, coef, after = widen(x, coef, after)
    return torch.addcmul(x, coef, look_ahead(x, coef, after))
