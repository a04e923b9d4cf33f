"""Trees of plain values: what JSON can hold, exactly, and back again; tensors may go to a file of their own."""

import json
from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes that an entry of an array has at most: a text of a dtype's own length could ask for any.
_WIDEST = 2**14


def copied(value: Any) -> Any:
    """A tree with containers and tensors of its own; what else it holds may not be one's to copy."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        twin = copy(value)
        for name, item in value.items():
            twin[name] = copied(item)
        return twin
    return type(value)(copied(item) for item in value) if type(value) in (list, tuple, set) else value


def plain(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A tree as JSON can hold it, exactly; tensors go to ``tensors`` if given, else into the tree as numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic) and _is_plain(value.dtype):
        return value.item()
    if isinstance(value, Tensor) and tensors is not None:
        while where in tensors:  # as {"a.b": ...} beside {"a": {"b": ...}}
            where += "'"
        tensors[where] = value
        return {"stored": where}
    if isinstance(value, Tensor) and not value.is_complex():
        numbers = value.detach().cpu().tolist()
        return {"tensor": numbers, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, np.ndarray) and _is_plain(value.dtype):
        return {"array": value.tolist(), "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        items = [(plain(k, where, tensors), plain(v, f"{where}.{k}", tensors)) for k, v in value.items()]
        return {kind: items}
    if isinstance(value, list | tuple):
        items = [plain(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    kind = f"{type(value).__name__}{f' of {value.dtype}' if isinstance(value, Tensor | np.ndarray) else ''}"
    raise TypeError(
        f"{where} is a {kind}, expected numbers, strings, tensors and containers of these: "
        "a checkpoint holds no pickled objects"
    )


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether JSON has what an array's entries are: truth values, short strings, and numbers of 64 bits at most."""
    return dtype.itemsize <= {"U": _WIDEST, "b": 8, "i": 8, "u": 8, "f": 8}.get(dtype.kind, -1)


def restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``plain`` was given.

    Raises:
        ValueError: it is nothing that ``plain`` makes; nothing has been run for it, and no memory taken that its text
            does not take as well.
    """
    try:
        return _restored(value, tensors)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{type(error).__name__}: {error!s:.200}") from error


def read_back(value: Any, where: str, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """What ``plain`` was given, if it would make of it what stands here, to the letter.

    Raises:
        ValueError: it would not, and so somebody else has made it.
    """
    found = restored(value, tensors or {})
    apart: dict[str, Tensor] = {}
    again = plain(found, where, None if tensors is None else apart)
    if json.dumps(again) != json.dumps(value) or apart.keys() != (tensors or {}).keys():
        raise ValueError(f"{where} is written otherwise than a checkpoint writes it")
    return found


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "stored" in value:
        return tensors[value["stored"]]
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{value['dtype']} is no dtype")
        found = torch.tensor(value["tensor"], dtype=dtype)
        return found.reshape(value.get("shape", found.shape))  # which an empty list does not tell
    if "array" in value:
        kind = np.dtype(value["dtype"])
        if not _is_plain(kind):
            raise TypeError(f"{kind} is no dtype of plain values")
        array = np.array(value["array"], dtype=kind)
        return array.reshape(value.get("shape", array.shape))
    if "tuple" in value:
        return tuple(_restored(item, tensors) for item in value["tuple"])
    kind, items = next(iter(value.items()))
    pairs = {_restored(key, tensors): _restored(item, tensors) for key, item in items}
    return {"dict": dict, "counter": Counter}[kind](pairs)
