"""Inputs of the property tests: small tensors of readable numbers.

Numbers are multiples of 1/8 within +-8, so that a counterexample can be checked with a pencil and ties, zeros and
signs all turn up; sequences have at most 6 steps and batches at most 3 rows, which finds nearly every mistake.
"""

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

NUMBERS = st.integers(-64, 64).map(lambda n: n / 8)
UNIT = st.integers(0, 20).map(lambda n: n / 20)
"""Discounts and the like: [0, 1], both ends included; most are not exact in float32, on purpose."""
POSITIVE = st.integers(1, 64).map(lambda n: n / 8)
CLIP = st.integers(1, 19).map(lambda n: n / 20)
"""Clip ranges in (0, 1)."""


class Case:
    """Named inputs of one example; prints as nested lists."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:  # for type checkers: fields are set by name
        raise AttributeError(name)

    def but(self, **fields: Any) -> "Case":
        """The same case with some fields replaced."""
        return Case(**{**self.__dict__, **fields})

    def __repr__(self) -> str:
        return f"Case({', '.join(f'{name}={_show(value)}' for name, value in self.__dict__.items())})"


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.int().tolist() if value.dtype == torch.bool else value.tolist())


def tensors(*shape: int, numbers: SearchStrategy[float] = NUMBERS) -> SearchStrategy[Tensor]:
    """float64 tensors of one shape."""
    size = torch.Size(shape).numel()
    return st.lists(numbers, min_size=size, max_size=size).map(
        lambda values: torch.tensor(values, dtype=torch.float64).reshape(shape)
    )


def masks(*shape: int) -> SearchStrategy[Tensor]:
    """Any boolean tensor of one shape: holes, empty rows and full rows included."""
    size = torch.Size(shape).numel()
    # Shrinks towards a full mask: a counterexample keeps a hole only when the hole matters.
    return st.lists(st.sampled_from((True, False)), min_size=size, max_size=size).map(
        lambda values: torch.tensor(values, dtype=torch.bool).reshape(shape)
    )


@st.composite
def cases(
    draw: st.DrawFn,
    names: str = "",
    *,
    per_row: str = "",
    logits: str = "",
    kept: int = 0,
    batch: int | None = None,
    time: int | None = None,
    numbers: SearchStrategy[float] = NUMBERS,
    **more: SearchStrategy[Any],
) -> Case:
    """A case with ``names`` of [batch, time], ``per_row`` of [batch], ``logits`` of [batch, time, vocab] and a mask.

    Args:
        draw: given by hypothesis.
        names: space-separated names of tensors [batch, time].
        per_row: names of tensors [batch].
        logits: names of tensors [batch, time, vocab], with 1 to 5 tokens.
        kept: at least so many True in the whole mask, by filling it from the front.
        batch: fixed number of rows (else 1 to 3).
        time: fixed number of steps (else 1 to 6).
        numbers: the numbers in the tensors.
        more: further fields by strategy.
    """
    rows = batch if batch is not None else draw(st.integers(1, 3))
    steps = time if time is not None else draw(st.integers(max(1, -(-kept // rows)), 6))
    fields: dict[str, Any] = {name: draw(tensors(rows, steps, numbers=numbers)) for name in names.split()}
    fields |= {name: draw(tensors(rows, numbers=numbers)) for name in per_row.split()}
    if logits:
        vocab = draw(st.integers(1, 5))
        fields |= {name: draw(tensors(rows, steps, vocab, numbers=numbers)) for name in logits.split()}
    mask = draw(masks(rows, steps))
    missing = kept - int(mask.sum())
    if missing > 0:
        mask.view(-1)[(~mask.view(-1)).nonzero().view(-1)[:missing]] = True
    fields["mask"] = mask
    return Case(**fields, **{name: draw(strategy) for name, strategy in more.items()})


def rows_of(mask: Tensor, *tensors: Tensor) -> Iterator[tuple[list[int], tuple[list[float], ...]]]:
    """Row by row: where something is kept, and the kept values of each tensor as Python numbers."""
    for row in range(mask.shape[0]):
        places = [t for t in range(mask.shape[1]) if mask[row, t].item()]
        yield places, tuple([x[row, t].item() for t in places] for x in tensors)


def kept_values(x: Tensor, mask: Tensor) -> list[float]:
    """The kept entries of x, as Python numbers."""
    return [value for _, (values,) in rows_of(mask, x) for value in values]


def put_back(mask: Tensor, rows: list[list[float]]) -> Tensor:
    """Per-row values of the kept positions as a tensor like ``mask``, 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, values in enumerate(rows):
        places = [t for t in range(mask.shape[1]) if mask[row, t].item()]
        for t, value in zip(places, values, strict=True):
            out[row, t] = value
    return out


def gradient(function: Any, x: Tensor) -> Tensor:
    """d function(x) / dx for a scalar function; zeros where it does not depend on x."""
    x = x.detach().clone().requires_grad_(True)
    value = function(x)
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value, x)[0]


def turned_product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b as the transpose of b' @ a', which is summed and laid out in another order than by ``torch.mm``."""
    found = (b.T.contiguous() @ a.T.contiguous()).T
    return found if out is None else out.copy_(found)
