"""Every test of the runtime: what transformers announces in its log as going away is an error, as its warnings are."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


class _Announcements(logging.Handler):
    """Raises on a deprecation: transformers logs some of them where Python would warn, and only once."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage().lower():
            raise AssertionError(f"transformers announces: {record.getMessage()}")


@pytest.fixture(autouse=True)
def deprecations_are_errors() -> Iterator[None]:
    logger, handler = logging.getLogger("transformers"), _Announcements(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture
def torchs_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those who watch operators in a backward pass: Intel's extension, once another test has imported it, puts a
    layer norm in place of torch's that has no gradient below a dispatch mode."""

    def layer_norm(
        input: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        return torch.native_layer_norm(input, shape, weight, bias, eps)[0]

    monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm)
