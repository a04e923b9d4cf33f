"""The one recurrence behind every temporal function of this package."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ppo_core._checks import check_floating, check_same_shape, check_shape, check_time_axis, widen


def linear_recurrence(
    x: Float[Tensor, "*batch time"], coef: Float[Tensor, "*batch time"], after: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + coef_t * y_{t+1}, with y = ``after`` (0 when None) behind the end.

    Two neighbours compose into one step of the same form, y_t = (x_t + c_t x_{t+1}) + (c_t c_{t+1}) y_{t+2}, so a
    sequence is halved until one step is left and then filled in again: O(time) work in O(log time) depth, no loop over
    time and no division (Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4). Exact up to rounding for
    every coefficient, 0 included.

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
    check_time_axis(x=x)
    check_same_shape("x", x, coef=coef)
    x, coef = widen(x, coef)
    time = x.shape[-1]
    if after is not None and time:
        check_floating(after=after)
        check_shape("x without its time axis", tuple(x.shape[:-1]), after=after)
        last = x[..., -1] + coef[..., -1] * after
        x = torch.cat((x[..., :-1], last.unsqueeze(-1)), dim=-1)
    # One padding to a power of two keeps every level even: a compiled graph then serves all lengths of an octave.
    size = 1
    while size < time:
        size *= 2
    if size != time:
        x, coef = pad(x, (0, size - time)), pad(coef, (0, size - time))
    return _halve_and_fill(x, coef, size)[..., :time]


def _halve_and_fill(x: Tensor, coef: Tensor, size: int) -> Tensor:
    if size == 1:
        return x
    x_even, x_odd = x[..., 0::2], x[..., 1::2]
    c_even, c_odd = coef[..., 0::2], coef[..., 1::2]
    even = _halve_and_fill(torch.addcmul(x_even, c_even, x_odd), c_even * c_odd, size // 2)
    # y at an odd place needs the y of the next even place; after the last one comes 0.
    odd = torch.addcmul(x_odd, c_odd, pad(even[..., 1:], (0, 1)))
    return torch.stack((even, odd), dim=-1).flatten(-2)
