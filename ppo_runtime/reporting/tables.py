"""The table of texts that goes to the trackers beside the curves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

Table = Sequence[Mapping[str, object]]
"""Rows, such as a prompt, its response and the reward."""


def rollout_table(
    batch: Mapping[str, Any], columns: Sequence[str], rewards: Sequence[float], tokenizer: Any
) -> list[dict[str, Any]]:
    """One row per sequence: those of ``columns`` that ``batch`` has, readable, and the reward.

    Rows of token ids, in lists or tensors, are decoded.

    Raises:
        ValueError: a column does not have one entry per reward.
    """
    present = [name for name in columns if name in batch]
    for name in present:
        if len(batch[name]) != len(rewards):
            raise ValueError(f"batch[{name!r}] has {len(batch[name])} entries, expected {len(rewards)} like rewards")
    cells = [[_readable(cell, tokenizer) for cell in batch[name]] for name in present]
    return [
        dict(zip(present, row, strict=True)) | {"reward": reward} for *row, reward in zip(*cells, rewards, strict=True)
    ]


def _readable(cell: Any, tokenizer: Any) -> Any:
    if isinstance(cell, Tensor):
        cell = cell.tolist()
    if not isinstance(cell, str) and isinstance(cell, Iterable):
        cell = list(cell)
        if cell and all(isinstance(token, int) for token in cell):
            return tokenizer.decode(cell)
        return str(cell)
    return cell
