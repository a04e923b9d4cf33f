"""The one comparison of the specification, with every tolerance in one place."""

from typing import Any

import torch
from torch import Tensor

TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5)}
"""dtype: (relative, absolute). Half precision has none: the core answers in float32 or wider."""


def assert_close(actual: Any, expected: Any, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Same shape, and values within the tolerance of ``dtype`` (the coarser of both dtypes when None).

    Numbers and nested lists count as float64 tensors, bundles are compared field by field. ``scale`` is the magnitude
    of what was added up on the way, where that is larger than the result: it widens the absolute tolerance.
    """
    if isinstance(actual, tuple):
        assert isinstance(expected, tuple), f"{actual} against {expected}"
        assert len(actual) == len(expected), f"{actual} against {expected}"
        for left, right in zip(actual, expected, strict=True):
            assert_close(left, right, scale=scale, dtype=dtype)
        return
    actual, expected = _tensor(actual), _tensor(expected)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if dtype is None:
        floating = [x.dtype for x in (actual, expected) if x.dtype.is_floating_point]
        dtype = max(floating, key=lambda d: torch.finfo(d).eps) if floating else torch.float64
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * max(1.0, scale), equal_nan=False
    )


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
