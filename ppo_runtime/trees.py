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
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        if tensors is None:
            return {"tensor": value.detach().cpu().tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors[where] = value
        return {"stored": where}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        items = [(plain(k, where, tensors), plain(v, f"{where}.{k}", tensors)) for k, v in value.items()]
        return {kind: items}
    if isinstance(value, list | tuple):
        items = [plain(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"{where} is a {type(value).__name__}, expected numbers, strings, tensors and containers of these: "
        "a checkpoint holds no pickled objects"
    )


def restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``plain`` was given."""
    if isinstance(value, list):
        return [restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "stored" in value:
        return tensors[value["stored"]]
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "tuple" in value:
        return tuple(restored(item, tensors) for item in value["tuple"])
    kind, items = next(iter(value.items()))
    pairs = ((restored(key, tensors), restored(item, tensors)) for key, item in items)
    return Counter(dict(pairs)) if kind == "counter" else dict(pairs)
