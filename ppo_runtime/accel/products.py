"""Matrix products by oneDNN, forward and backward, for what trains in float32 on a CPU.

Stock torch multiplies float32 matrices by MKL, which takes slower paths on processors of other makers than its own:
about 100 GFLOP/s per core on an AMD EPYC of 2025, where the oneDNN that torch brings as well reaches 220. A step is
such products, so it takes half the time. Weights stay as they are: nothing is packed and nothing goes stale.

The operator is torch's own, but private to its compiler: whether it is there, and gives what torch.mm gives, is tried
before it is relied on. It compiles a kernel for every shape and keeps a thousand of them, at 0.6 MiB each; rows of text
come in any number, so that they are filled up to one of few.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ppo_core.fused_head import Product
from ppo_runtime.accel.probing import first_line
from ppo_runtime.common.undoing import undoing
from ppo_runtime.models.inner import is_compiled
from ppo_runtime.models.stand_ins import has_own_forward, standing_in

logger = logging.getLogger(__name__)

SMALLEST = 2**21
"""Multiplications from which on a product and its two gradients take less time than torch's: a call costs more."""
TOLERANCE = 1e-5
"""Of products of numbers around 1, relative to the root of how many are summed."""

_current: ContextVar[Product] = ContextVar("_current", default=torch.mm)


@contextmanager
def fast_products(model: nn.Module, requested: str) -> Iterator[None]:
    """Inside, the model's float32 linear layers multiply by oneDNN, with and without gradients, where that is faster.

    Nothing else about the model changes, and afterwards nothing at all has.

    Args:
        model: in whichever mode; layers to which somebody has given a forward pass of their own keep it, and those of
            a compiled part are torch's affair.
        requested: PPOConfig's ``accel``. "eager" leaves products to torch, and "onednn" takes oneDNN's wherever they
            can be had, on a processor for which MKL was made too.
    """
    if requested == "eager" or is_compiled(model) or obstacle(requested) is not None:
        yield
        return
    compiled = {id(layer) for part in model.modules() if _compiles(part) for layer in part.modules()}
    linear = [
        layer
        for layer in model.modules()
        if type(layer) in (nn.Linear, Conv1D) and id(layer) not in compiled and not has_own_forward(layer)
    ]
    with undoing() as undo, standing_in(linear, _forward):
        undo.append(partial(_current.set, _current.get()))
        _current.set(product)
        yield


def current_product() -> Product:
    """What multiplies matrices here: oneDNN inside :func:`fast_products`, else ``torch.mm``."""
    return _current.get()


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``torch.mm(a, b, out=out)`` without gradient, by oneDNN where that is faster."""
    if not (_plain(a) and _plain(b) and a.numel() * b.shape[-1] >= SMALLEST):
        return torch.mm(a, b, out=out)
    # Rows of text times a weight, or columns of text times rows of it, as for the gradient of a weight.
    rows = a.is_contiguous()
    found = _by_onednn(filled(a), b)[: len(a)] if rows else _by_onednn(filled(a.T).T, filled(b))
    return found if out is None else out.copy_(found)


def obstacle(requested: str) -> str | None:
    """What is in the way of products by oneDNN, None if nothing."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} has no oneDNN operator for linear layers"
    if requested != "onednn" and not _mkl_is_slow():
        return "torch's own products are taken to be as fast on this processor"
    return _disagreement()


class _Linear(torch.autograd.Function):
    """rows @ weight.T + bias, or rows @ weight + bias of a weight that lies the other way round."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        rows_learn, weight_learns, *_ = ctx.needs_input_grad
        ctx.save_for_backward(rows if weight_learns else None, weight if rows_learn else None)
        ctx.turned, ctx.shape = turned, rows.shape
        found = _by_onednn(filled(rows.reshape(-1, rows.shape[-1])), weight if turned else weight.T, bias)
        # Cut by its size: a view could not be changed in place by whoever gets it.
        return found.resize_(*rows.shape[:-1], found.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        by_rows = by_weight = by_bias = None
        flat = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        whole = filled(flat)
        if ctx.needs_input_grad[0]:
            by_rows = _by_onednn(whole, weight.T if ctx.turned else weight).resize_(ctx.shape)
        if ctx.needs_input_grad[1]:
            inputs = filled(rows.reshape(-1, rows.shape[-1]))
            by_weight = _by_onednn(inputs.T, whole) if ctx.turned else _by_onednn(whole.T, inputs)
        if ctx.needs_input_grad[2]:
            by_bias = flat.sum(0)
        return by_rows, by_weight, by_bias, None


def by_name(layer: Any, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A forward pass whose argument has the name that the layer's class gives it."""
    return (lambda x: forward(x)) if type(layer) is Conv1D else (lambda input: forward(input))


def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    turned = type(layer) is Conv1D

    def forward(rows: Tensor) -> Tensor:
        weight = layer.weight
        outputs = weight.shape[1 if turned else 0]
        if not (_plain(rows) and _plain(weight) and rows.numel() * outputs >= SMALLEST):
            return type(layer).forward(layer, rows)
        return _Linear.apply(rows, weight, layer.bias, turned)

    return by_name(layer, forward)


def _compiles(part: nn.Module) -> bool:
    """Whether torch.compile makes a graph of a part, in place or around it: nothing in it may be another."""
    return is_compiled(part) or getattr(part, "_compiled_call_impl", None) is not None


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias; both lie in rows or in columns."""
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).T, bias, "none", [], "")


def rounded(count: int) -> int:
    """The next of few numbers, at most an eighth above: eight of them between a power of two and the next."""
    step = max(1, 2 ** (count.bit_length() - 4))
    return -(-count // step) * step


def filled(x: Tensor) -> Tensor:
    """A matrix with rows of zeros below, up to a rounded number of them."""
    more = rounded(len(x)) - len(x)
    return functional.pad(x, (0, 0, 0, more)) if more else x


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


def _plain(x: Tensor) -> bool:
    """Whether it is float32 numbers in this machine's memory, and nothing that stands for others."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def _mkl_is_slow() -> bool:
    return torch.backends.mkl.is_available() and _maker() != "GenuineIntel"


@cache
def _maker(path: str = "/proc/cpuinfo") -> str:
    """Of the processor, as it says itself."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                return value.strip()
    return "GenuineIntel" if "GenuineIntel" in platform.processor() else platform.processor()


@cache
def _disagreement() -> str | None:
    """How products by oneDNN differ from torch's, of matrices that lie in rows and in columns; None if they agree."""
    rows, inner, columns = 65, 130, 257
    # Whatever the caller's default is.
    a = torch.linspace(-1, 1, rows * inner, dtype=torch.float32).sin().reshape(rows, inner)
    b = torch.linspace(-2, 2, inner * columns, dtype=torch.float32).cos().reshape(inner, columns)
    exact = a.double() @ b.double()
    try:
        for left in (a, a.T.contiguous().T):
            for right in (b, b.T.contiguous().T):
                difference = (_by_onednn(left, right) - exact).abs().max().item()
                if not difference <= TOLERANCE * inner**0.5:
                    return f"products by oneDNN are not what they should be (they differ by {difference:.3g})"
    except Exception as error:
        return f"oneDNN could not multiply ({first_line(error)})"
    return None
