"""Digests of a dataset's prompts, by which a run knows its data again."""

from array import array
from collections.abc import Iterator, Mapping
from hashlib import blake2b, sha256
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch.utils.data import DataLoader

from ppo_runtime.rollout.data import is_table, transforms

_LOOKED_AT = 64
_KNOWN: WeakKeyDictionary[DataLoader[Any], str | None] = WeakKeyDictionary()


def digest_of(loader: Any, *, again: bool = False) -> str | None:
    """:func:`prompt_digest` of a dataloader's dataset, which is read once.

    It is read again where a call of ``train`` begins or a checkpoint is loaded: rows that are changed in place while a
    run goes on are not looked at.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader):  # of any class, which nothing can be kept of
        return None if dataset is None else prompt_digest(dataset)
    if again or loader not in _KNOWN:
        _KNOWN[loader] = prompt_digest(dataset)
    return _KNOWN[loader]


def prompt_digest(dataset: Any) -> str | None:
    """SHA-256 of all prompts in their order, the same for the same prompts; 100,000 of 64 tokens take half a second.

    None where looking at a row could change anything, as a transform that draws random numbers does, or where a prompt
    is something else than whole numbers.
    """
    if not _readable(dataset):
        return None
    column = dataset.data["input_ids"] if is_table(dataset) and "input_ids" in dataset.column_names else None
    try:
        if column is not None and _holds_lists(column.type):
            each = _of_table(column, dataset._indices)
        else:
            each = b"".join(_of_row(ids.tolist() if hasattr(ids, "tolist") else ids) for ids in _prompts(dataset))
    except (TypeError, ValueError, OverflowError):  # of what is no row of whole numbers
        return None
    return sha256(each).hexdigest()


def sampled_digest(dataset: Any) -> str | None:
    """SHA-256 of 64 of the prompts, as checkpoints of before have it."""
    if not _readable(dataset):
        return None
    digest = sha256()
    for ids in _prompts(dataset, -(-len(dataset) // _LOOKED_AT)):
        tokens = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(tokens, list | tuple) or not all(isinstance(token, int | np.integer) for token in tokens):
            return None
        digest.update(repr([int(token) for token in tokens]).encode())
    return digest.hexdigest()


def _readable(dataset: Any) -> bool:
    return (is_table(dataset) or isinstance(dataset, list | tuple)) and len(dataset) > 0 and not transforms(dataset)


def _prompts(dataset: Any, every: int = 1) -> Iterator[Any]:
    for index in range(0, len(dataset), every):
        row = dataset[index]
        yield row.get("input_ids") if isinstance(row, Mapping) else row


def _of_row(ids: Any) -> bytes:
    if not isinstance(ids, list | tuple):
        raise TypeError(f"a prompt is a {type(ids).__name__}")
    return blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def _holds_lists(kind: Any) -> bool:
    """Of whole numbers, as Arrow keeps them."""
    import pyarrow

    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return lists and pyarrow.types.is_integer(kind.value_type)


def _of_table(column: Any, indices: Any) -> bytes:
    """The digests of a table's rows in the order of a dataset, whose rows they may be in another order or in part."""
    length = len(column)
    if indices is None:
        wanted, places = np.arange(length), slice(None)
    else:
        wanted, places = np.unique(indices.column(0).to_numpy(), return_inverse=True)
    found, start = [], 0
    for chunk in column.chunks:
        if chunk.null_count or chunk.flatten().null_count:
            raise ValueError("a prompt is missing")
        ends = np.cumsum(chunk.value_lengths().to_numpy())
        begins = ends - chunk.value_lengths().to_numpy()
        values = chunk.flatten().to_numpy()
        rows = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(chunk))] - start
        found += [
            blake2b(values[begin:end].astype(np.int64).tobytes(), digest_size=16).digest()
            for begin, end in zip(begins[rows].tolist(), ends[rows].tolist(), strict=True)
        ]
        start += len(chunk)
    return np.array(found, dtype="V16")[places].tobytes()
