"""Trees of plain values: what JSON can hold, exactly, and back again; tensors may go to a file of their own."""

from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """Whether JSON has what an array's entries are: truth values, strings, and numbers of 64 bits at most."""
    return dtype.kind == "U" or (dtype.kind in "biuf" and dtype.itemsize <= 8)


def restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``plain`` was given."""
    if isinstance(value, list):
        return [restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "stored" in value:
        return tensors[value["stored"]]
    if "tensor" in value:
        found = torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        return found.reshape(value.get("shape", found.shape))  # which an empty list does not tell
    if "array" in value:
        array = np.array(value["array"], dtype=value["dtype"])
        return array.reshape(value.get("shape", array.shape))
    if "tuple" in value:
        return tuple(restored(item, tensors) for item in value["tuple"])
    kind, items = next(iter(value.items()))
    pairs = ((restored(key, tensors), restored(item, tensors)) for key, item in items)
    return Counter(dict(pairs)) if kind == "counter" else dict(pairs)
