"""The parallel form of y_t = x_t + c_t y_{t+1}, its derivatives, and a form of it for torch.compile."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def look_ahead(x: Tensor, coef: Tensor, after: Tensor) -> Tensor:
    """y_{t+1} for every t: what lies ahead of each step of :func:`ppo_core.scan.linear_recurrence`.

    This is what the temporal functions read, and what both derivatives of the recurrence are made of. The arguments
    are those of the recurrence, checked.
    """
    time = x.shape[-1]
    if not time:
        return x
    if not torch.compiler.is_compiling():
        return _apply(x, coef, after)
    # The compiler differentiates the operations themselves. Padded to a power of two, every level has a size that it
    # knows, and one graph serves all lengths of an octave.
    size = 1
    while size < time:
        size *= 2
    return _traced(*_padded(x, coef, size - time), after)[..., :time]


# By measurement: a group's steps lie one behind the other in memory, so that a wider one reads more lines for the same
# numbers, and a few steps at the end cost less one by one than in groups.
_GROUP, _FEW = 4, 16


def _scan(x: Tensor, coef: Tensor, after: Tensor) -> Tensor:
    """:func:`look_ahead`, written in place."""
    time = x.shape[-1]
    group = time if time <= _FEW else _GROUP
    x, coef = _padded(x, coef, -time % group)
    out = torch.empty_like(x)
    xs, cs, places = _steps(x, group), _steps(coef, group), _steps(out, group)
    y = after.unsqueeze(-1)
    if time > group:
        y = _scan(*_composed(xs, cs), after)
    # From the last step of every group to its first; what lies ahead of a step is what the next one comes to.
    places[-1].copy_(y)
    for t in range(group - 1, 0, -1):
        torch.addcmul(xs[t], cs[t], places[t], out=places[t - 1])
    return out[..., :time]


def _traced(x: Tensor, coef: Tensor, after: Tensor) -> Tensor:
    """The same for torch.compile, without writing in place. The length of the time axis is a power of two."""
    time = x.shape[-1]
    group = min(time, _GROUP)
    xs, cs = _steps(x, group), _steps(coef, group)
    y = after.unsqueeze(-1)
    if time > group:
        y = _traced(*_composed(xs, cs), after)
    ahead = [y]
    for t in range(group - 1, 0, -1):
        ahead.append(torch.addcmul(xs[t], cs[t], ahead[-1]))
    return torch.stack(ahead[::-1], dim=-1).flatten(-2)


def _composed(xs: tuple[Tensor, ...], cs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Compose the steps of every group into one step of the same form."""
    total, product = xs[-1], cs[-1]
    for t in range(len(xs) - 2, -1, -1):
        total, product = torch.addcmul(xs[t], cs[t], total), cs[t] * product
    return total, product


def _padded(x: Tensor, coef: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Append steps that pass on what follows (x = 0, coef = 1)."""
    return (pad(x, (0, steps)), pad(coef, (0, steps), value=1.0)) if steps else (x, coef)


def _steps(x: Tensor, group: int) -> tuple[Tensor, ...]:
    """Views of the first, second, ... step of every group."""
    return torch.unbind(x.reshape(*x.shape[:-1], x.shape[-1] // group, group), -1)


class _LookAhead(torch.autograd.Function):
    """:func:`look_ahead` with its derivatives, written in place; keeps the coefficients and the result only."""

    @staticmethod
    def forward(x: Tensor, coef: Tensor, after: Tensor) -> Tensor:
        return _scan(x, coef, after)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)
        ctx.save_for_forward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coef, ahead = ctx.saved_tensors
        # y_{t+1} is read at t, directly and by way of y_t: with b_t for the gradient by y_t (and by x_t),
        # b_{t+1} = grad_t + c_t b_t, the same recurrence forwards in time, with nothing before the first step.
        grad = grads[0]
        by_x = _apply(grad.flip(-1), coef.flip(-1), torch.zeros_like(grad[..., 0])).flip(-1)
        return by_x, by_x * ahead, torch.addcmul(grad[..., -1], coef[..., -1], by_x[..., -1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        coef, ahead = ctx.saved_tensors
        return _apply(torch.addcmul(tangents[0], tangents[1], ahead), coef, tangents[2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        x, coef, after = (
            arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        )
        return _apply(x, coef, after), 0


def _apply(x: Tensor, coef: Tensor, after: Tensor) -> Tensor:
    return _LookAhead.apply(x, coef, after)  # pyright: ignore  (torch leaves apply untyped)
