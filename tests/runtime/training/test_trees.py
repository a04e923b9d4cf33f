"""Plain trees: what JSON has held is what it was, and what it can't hold is named."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_runtime.common.trees import plain, read_back, restored

HELD: dict[str, Any] = {
    "tensor": torch.tensor([0.1, float("nan"), float("inf")]),
    "empty tensor": torch.zeros(0, 3, dtype=torch.bfloat16),
    "tensor of one": torch.tensor(2**60),
    "truth values": torch.tensor([[True], [False]]),
    "array": np.array([0.1, 0.2], dtype=np.float32),
    "empty array": np.zeros((2, 0, 3), dtype=np.int8),
    "strings": np.array(["a", "bc"]),
    "keys": {1: "a", "1": "b", (1, 2): None, "tensor": 3},
    "containers": [(1, [2.5]), Counter("aab"), {}],
}


def told(value: Any) -> Any:
    """A value as text that tells type, dtype, shape and every entry."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {value.tolist()}"
    if isinstance(value, list):
        return [told(item) for item in value]
    return f"{type(value).__name__} {value!r}"


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("apart", [False, True])
def test_what_was_held_is_what_it_was(case: str, apart: bool) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(plain(HELD[case], "it", tensors if apart else None))
    assert told(restored(json.loads(text), tensors)) == told(HELD[case])


def test_no_name_of_a_tensor_stands_for_two() -> None:
    held = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    held["a.b'"] = torch.tensor(5)
    tensors: dict[str, Tensor] = {}
    text = json.loads(json.dumps(plain(held, "it", tensors)))
    assert told(read_back(text, "it", tensors)) == told(held)
    assert len(tensors) == 5


WIDE = pytest.mark.skipif(np.dtype(np.longdouble).itemsize <= 8, reason="a long double is an ordinary one here")


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (torch.tensor([1j]), r"Tensor of torch\.complex64"),
        (np.array([1j]), "ndarray of complex128"),
        (np.complex64(1), "complex64"),
        pytest.param(np.longdouble(1), "longdouble", marks=WIDE),
        pytest.param(np.array([1], dtype=np.longdouble), "ndarray of float", marks=WIDE),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "ndarray of datetime64"),
        (np.array([{}, None], dtype=object), "ndarray of object"),
        (np.array([b"a"]), r"ndarray of \|S1"),
        (np.array(["a" * 5000]), "ndarray of <U5000"),
        ({1}, "set"),
        (b"a", "bytes"),
    ],
)
def test_what_cannot_be_held_is_named(odd: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"^it\.a\.0 is a {kind}.*expected numbers, strings"):
        plain({"a": [odd]}, "it")


def test_numbers_of_numpy_become_pythons() -> None:
    assert told(plain([np.float32(0.1), np.int64(3), np.bool_(True)], "it")) == told([float(np.float32(0.1)), 3, True])
