"""The one recurrence behind every temporal function of this package."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ppo_core._checks import check_floating, check_same_device, check_same_shape, check_shape, check_time_axis, widen


def linear_recurrence(
    x: Float[Tensor, "*batch time"], coef: Float[Tensor, "*batch time"], after: Float[Tensor, "*batch"] | None = None
) -> Float[Tensor, "*batch time"]:
    """y_t = x_t + coef_t * y_{t+1}, with y = ``after`` (0 when None) behind the end.

    Neighbours compose into one step of the same form, y_t = (x_t + c_t x_{t+1}) + (c_t c_{t+1}) y_{t+2}, so that up
    to eight are taken together until one step is left, and then filled in again: O(time) work in O(log time) depth, no
    loop over time and no division (Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4). Exact up to
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
    check_time_axis(x=x)
    check_same_shape("x", x, coef=coef)
    x, coef = widen(x, coef)
    time = x.shape[-1]
    if after is not None and time:
        check_floating(after=after)
        check_shape("x without its time axis", tuple(x.shape[:-1]), after=after)
        check_same_device("x", x, after=after)
        last = x[..., -1] + coef[..., -1] * after
        x = torch.cat((x[..., :-1], last.unsqueeze(-1)), dim=-1)
    if not torch.compiler.is_compiling():
        return _apply(x, coef)
    # The compiler differentiates the operations themselves. Padded to a power of two, every level has a size that it
    # knows, and one graph serves all lengths of an octave.
    size = 1
    while size < time:
        size *= 2
    return _scan(pad(x, (0, size - time)), pad(coef, (0, size - time)))[..., :time]


_TOGETHER = 8


def _scan(x: Tensor, coef: Tensor) -> Tensor:
    time = x.shape[-1]
    if time < 2:
        return x
    group = min(_TOGETHER, time)
    if time % group:
        x, coef = pad(x, (0, -time % group)), pad(coef, (0, -time % group))
    xs, cs = _places(x, group), _places(coef, group)
    total, product = xs[-1], cs[-1]
    for x_t, c_t in zip(xs[-2::-1], cs[-2::-1], strict=True):
        total, product = torch.addcmul(x_t, c_t, total), c_t * product
    y = pad(_scan(total, product)[..., 1:], (0, 1))
    filled: list[Tensor] = []
    compiling = torch.compiler.is_compiling()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    places = (None,) * group if compiling else _places(out, group)
    for x_t, c_t, place in zip(reversed(xs), reversed(cs), reversed(places), strict=True):
        y = torch.addcmul(x_t, c_t, y, out=place)
        filled.append(y)
    return (torch.stack(filled[::-1], dim=-1).flatten(-2) if compiling else out)[..., :time]


def _places(x: Tensor, group: int) -> tuple[Tensor, ...]:
    """Views of the first, second, ... step of every group."""
    return torch.unbind(x.reshape(*x.shape[:-1], x.shape[-1] // group, group), -1)


class _Scan(torch.autograd.Function):
    """The same with its derivatives: written in place, and nothing kept but the coefficients and the result."""

    @staticmethod
    def forward(x: Tensor, coef: Tensor) -> Tensor:
        y = _scan(x, coef)
        return y.clone() if y is x else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)
        ctx.save_for_forward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        coef, y = ctx.saved_tensors
        # Forwards in time: g_t = grad_t + c_{t-1} g_{t-1}.
        by_x = _apply(grads[0].flip(-1), pad(coef[..., :-1], (1, 0)).flip(-1)).flip(-1)
        return by_x, by_x * pad(y[..., 1:], (0, 1))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        coef, y = ctx.saved_tensors
        return _apply(tangents[0] + tangents[1] * pad(y[..., 1:], (0, 1)), coef)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        x, coef = (
            a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)
            for a, dim in zip(args, in_dims, strict=True)
        )
        return _apply(x, coef), 0


def _apply(x: Tensor, coef: Tensor) -> Tensor:
    return _Scan.apply(x, coef)  # pyright: ignore
