"""Prompts as the training loop reads them: checked in the data before a run begins, and in every batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_runtime.common import inputs
from ppo_runtime.rollout.data import is_table, transforms
from ppo_runtime.rollout.room import Room

_TOKENISE = "tokenise the text first: tokenizer(text)['input_ids']"
_CHUNK = 1000


def check_dataset(dataset: Any, *, vocab_size: int, room: Room) -> None:
    """Refuse a dataset with a prompt that no step could take, by its row.

    A ``datasets.Dataset`` and a list are read to the end. Rows of other datasets, and of one with a transform
    (``set_transform``), are checked when their batch comes: reading one may cost much or draw random numbers.

    Args:
        dataset: rows with "input_ids", for the collator of lists.
        vocab_size: of the model.
        room: what a prompt may take.
    """
    for index, row in _suspects(dataset, vocab_size, room.tokens):
        where = f"dataset[{index}]"
        if not isinstance(row, Mapping) or "input_ids" not in row:
            found = f"has {_names(row)}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
            raise ValueError(f"{where} {found}, expected a row with 'input_ids'; {_TOKENISE}")
        ids = _prompt(f"{where}['input_ids']", row["input_ids"], row.get("attention_mask"))
        try:
            inputs.token_rows("prompt", [ids], vocab_size=vocab_size)
        except ValueError as refusal:
            raise ValueError(str(refusal).replace("prompt[0]", f"{where}['input_ids']")) from refusal
        if room.tokens is not None and len(ids) > room.tokens:
            raise ValueError(
                f"{where}['input_ids'] has {len(ids)} tokens, expected at most {room.tokens}, so that {room.why}; "
                "shorten or drop the row, or generate fewer tokens"
            )


def batch_prompts(batch: Any, *, vocab_size: int) -> list[Tensor]:
    """The prompts of a batch, one 1-d tensor each; what "attention_mask" calls padding is taken off."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"the dataloader gave a {type(batch).__name__}, expected a dictionary with 'input_ids'; have data_collator "
            "return one"
        )
    if "input_ids" not in batch:
        raise ValueError(f"the batch has {_names(batch)}, expected 'input_ids'; {_TOKENISE}")
    rows, masks = batch["input_ids"], batch.get("attention_mask")
    for name, column in {"input_ids": rows, "attention_mask": masks}.items():
        rowwise = hasattr(column, "__len__") and not isinstance(column, str | Mapping)
        if not rowwise and (name == "input_ids" or column is not None):
            raise ValueError(f"batch[{name!r}] is a {type(column).__name__}, expected one list of tokens per row")
    masks = [None] * len(rows) if masks is None else masks
    if len(masks) != len(rows):
        raise ValueError(f"batch['attention_mask'] has {len(masks)} rows, expected {len(rows)} like batch['input_ids']")
    prompts = [_prompt(f"batch['input_ids'][{i}]", row, masks[i]) for i, row in enumerate(rows)]
    return inputs.token_rows("batch['input_ids']", prompts, vocab_size=vocab_size)


def batch_texts(batch: Mapping[str, Any], prompts: Sequence[Tensor], tokenizer: Any) -> list[str]:
    """What the score function reads as prompts: "query" where the batch has it, else the decoded tokens."""
    if batch.get("query") is None:
        return tokenizer.batch_decode(prompts, skip_special_tokens=True)
    texts = batch["query"]
    if isinstance(texts, str) or not hasattr(texts, "__len__") or len(texts) != len(prompts):
        found = f"{len(texts)} entries" if hasattr(texts, "__len__") else f"a {type(texts).__name__}"
        raise ValueError(f"batch['query'] has {found}, expected {len(prompts)} texts like batch['input_ids']")
    return list(texts)


def _prompt(where: str, ids: Any, mask: Any) -> Tensor:
    """One prompt as a tensor, without its padding."""
    if isinstance(ids, str):
        raise ValueError(f"{where} is the text {ids[:40]!r}, expected token ids; {_TOKENISE}")
    row = _tensor(where, ids, "a list of token ids")
    if mask is not None:
        kept = _tensor(where.replace("input_ids", "attention_mask"), mask, "1 for each token and 0 for padding").bool()
        if kept.shape != row.shape:
            raise ValueError(f"{where} has shape {tuple(row.shape)}, and its attention_mask {tuple(kept.shape)}")
        row = row[kept]
    return row if row.numel() else row.long()  # an empty list has no dtype of its own


def _tensor(where: str, numbers: Any, expected: str) -> Tensor:
    try:
        return torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} is {numbers!r:.60}, expected {expected}: {error}") from error


def _suspects(dataset: Any, vocab_size: int, room: int | None) -> Iterator[tuple[int, Any]]:
    """The rows to look at one by one: all of a list, and of a table those chunks that a quick look does not clear."""
    if isinstance(dataset, list | tuple):
        yield from enumerate(dataset)
    if not is_table(dataset) or transforms(dataset):
        return
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"dataset has the columns {_names(dataset.column_names)}, expected 'input_ids'; {_TOKENISE}")
    columns = [name for name in ("input_ids", "attention_mask") if name in dataset.column_names]
    table: Any = dataset.select_columns(columns).with_format("arrow")
    for start in range(0, len(dataset), _CHUNK):
        chunk = table[start : start + _CHUNK]
        if not _clear(*map(chunk.column, columns), vocab_size=vocab_size, room=room):
            yield from enumerate(chunk.to_pylist(), start)


def _clear(ids: Any, masks: Any = None, *, vocab_size: int, room: int | None) -> bool:
    """Whether every row of these columns is a prompt that a step can take, without what its mask calls padding."""
    types, compute = _arrow()
    columns = [ids] if masks is None else [ids, masks]
    flat = [_flat(column) for column in columns]
    if any(values is None for values in flat) or not types.is_integer(ids.type.value_type):
        return False
    lengths = [compute.list_value_length(column) for column in columns]
    if not lengths[0].equals(lengths[-1]):
        return False
    tokens, counts = flat[0], lengths[0].to_numpy()
    if counts.min() == 0:
        return False
    if masks is not None:
        kept = flat[1] != 0
        tokens, counts = tokens[kept], np.add.reduceat(kept, np.cumsum(counts) - counts, dtype=np.int64)
    return (
        counts.min() > 0 and (room is None or counts.max() <= room) and tokens.min() >= 0 and tokens.max() < vocab_size
    )


def _flat(column: Any) -> Any:
    """All entries of a column of lists of numbers, one after another; None if it is another kind or has gaps."""
    (types, compute), kind = _arrow(), column.type
    if not (types.is_list(kind) or types.is_large_list(kind)) or column.null_count:
        return None
    entry = kind.value_type
    entries = compute.list_flatten(column)
    if not (types.is_integer(entry) or types.is_floating(entry) or types.is_boolean(entry)) or entries.null_count:
        return None
    return entries.to_numpy()


def _arrow() -> tuple[Any, Any]:
    """pyarrow's types and functions, imported where a table is at hand: they take 30 MiB."""
    import pyarrow
    import pyarrow.compute

    return pyarrow.types, pyarrow.compute


def _names(columns: Any) -> str:
    return ", ".join(map(repr, columns)) or "no columns"
