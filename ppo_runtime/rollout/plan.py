"""What every batch of a call of ``generate`` has in common, and prompts padded to one width."""

from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


@attrs.frozen
class Plan:
    """What is the same for every model that answers: padding, batches and what ends a row."""

    batch_size: int
    pad_token_id: int
    eos_token_ids: Sequence[int]
    criteria: Sequence[Any]
    decoder_start_token_id: int | None
    """Given for an encoder-decoder only."""
    prompt_width: int = 0
    """The least width of a batch of prompts."""
    places: Sequence[int] | None = None
    """Where each of the queries stands among the caller's, if they were put in another order."""
    most: Sequence[int] | None = None
    """Most tokens of each query's response, where rows of a batch differ; what an engine makes beyond is cut off."""


def padded(
    rows: Sequence[Tensor], pad_token_id: int, *, side: Literal["left", "right"], width: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] padded on one side to ``width`` at least, and a mask made from lengths, never from token ids."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    missing = max(width - ids.shape[1], 0)
    more = (missing, 0) if side == "left" else (0, missing)
    return F.pad(ids, more, value=pad_token_id), F.pad(mask, more)
