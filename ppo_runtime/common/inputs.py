"""Checks of queries, responses, scores and masks: bad input is refused by name before anything has changed."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_runtime.common.transfers import on_cpu

LARGEST_SCORE = torch.finfo(torch.float32).max


class NotFinite(ValueError):
    """A batch has led to numbers that are not finite, or will do so: it cannot be trained on."""


def query_rows(name: str, queries: Any, *, vocab_size: int) -> tuple[list[Tensor], bool]:
    """Check one query or a list of them, rows of token ids as tensors, arrays or lists of ints; whether it was one."""
    single = hasattr(queries, "ndim") or (
        isinstance(queries, list | tuple) and len(queries) > 0 and all(_is_number(one) for one in queries)
    )
    if not single and not isinstance(queries, list | tuple):
        raise ValueError(
            f"{name} is a {type(queries).__name__}, expected a 1-d tensor of token ids or a list of such rows"
        )
    rows = [
        _as_tensor(name if single else f"{name}[{i}]", row) for i, row in enumerate([queries] if single else queries)
    ]
    if single and rows[0].ndim != 1:
        raise ValueError(
            f"{name} has shape {tuple(rows[0].shape)}, expected one query (length,) or a list of such rows: "
            "pass list(query_tensor) without its padding"
        )
    return token_rows(name, rows, vocab_size=vocab_size), single


def _as_tensor(name: str, row: Any) -> Tensor:
    if isinstance(row, Tensor):
        return row
    is_array = hasattr(row, "ndim") and hasattr(row, "dtype")
    if not is_array and not (isinstance(row, list | tuple) and all(_is_number(token) for token in row)):
        raise ValueError(f"{name} is {row!r:.60}, expected a 1-d tensor of token ids or a list of ints")
    try:
        # An empty list has no dtype of its own, and what is said about it is that it is empty.
        return torch.as_tensor(row, dtype=torch.long if not is_array and len(row) == 0 else None)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is {row!r:.60}, expected token ids: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, bool)


def token_rows(name: str, rows: Any, *, vocab_size: int) -> list[Tensor]:
    """Check a list of 1-d int64 token tensors with ids inside the vocabulary; returns them on the CPU."""
    if isinstance(rows, Tensor) or not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"{name} is a {type(rows).__name__}, expected a list of 1-d token tensors")
    if not rows:
        raise ValueError(f"{name} is an empty list, expected at least one row of tokens")
    rows = on_cpu(rows)
    for index, row in enumerate(rows):
        where = f"{name}[{index}]"
        if not isinstance(row, Tensor):
            raise ValueError(f"{where} is a {type(row).__name__}, expected a 1-d tensor of token ids")
        if row.ndim != 1:
            raise ValueError(f"{where} has shape {tuple(row.shape)}, expected 1-d (length,); remove the batch axis")
        # An empty tensor is a float one unless it is told otherwise: what is said about it is that it is empty.
        if row.numel() > 0 and row.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{where} has dtype {row.dtype}, expected token ids in torch.int64")
        holds_numbers(where, row)
        if row.numel() == 0:
            remedy = (
                "a policy that stops at once still answers with its EOS: keep that token"
                if name.endswith("responses")
                else "start the prompt with a BOS or EOS token"
            )
            raise ValueError(f"{where} is empty, expected at least one token; {remedy}, or drop the row")
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{where} holds token id {low if low < 0 else high}, expected ids in [0, {vocab_size}); "
                "was it made with this model's tokenizer?"
            )
    return [row.long() for row in rows]


def holds_numbers(where: str, x: Tensor) -> None:
    """Refuse tensors whose numbers cannot be looked at, or not row by row."""
    if x.is_meta:
        raise ValueError(f"{where} is on the meta device, where tensors hold no numbers, expected a real device")
    if x.layout != torch.strided:
        raise ValueError(f"{where} has layout {x.layout}, expected a dense tensor; convert with to_dense()")


def score_vector(scores: Any, *, count: int, name: str = "scores") -> Tensor:
    """Check one finite number per sequence; returns float32 [count].

    Numbers may be tensors on any device, Python's or numpy's; True counts 1, for verdicts of a checker.
    """
    if not isinstance(scores, Sequence) or isinstance(scores, str | bytes):
        raise ValueError(f"{name} is a {type(scores).__name__}, expected a list of 0-d or 1-element tensors")
    if len(scores) != count:
        raise ValueError(f"{name} has {len(scores)} entries, expected {count} like queries")
    found = [_score(f"{name}[{i}]", score) for i, score in enumerate(on_cpu(scores))]
    return torch.tensor(found, dtype=torch.float32)


def _score(where: str, score: Any) -> float:
    if isinstance(score, Tensor):
        if score.numel() != 1 or score.ndim > 1:
            raise ValueError(
                f"{where} has shape {tuple(score.shape)}, expected a 0-d or 1-element tensor: one score per sequence"
            )
        holds_numbers(where, score)
        score = score.item()
    if not isinstance(score, numbers.Real | np.bool_):
        raise ValueError(f"{where} is a {type(score).__name__}, expected a real number or a tensor that holds one")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf  # an integer of more than 308 digits
    if not math.isfinite(value):
        raise NotFinite(f"{where} is {value}, expected a finite number; mend the score function or drop the row")
    if abs(value) > LARGEST_SCORE:
        raise NotFinite(
            f"{where} is {value:.6g}, expected a number that float32 can hold, up to 3.4e38; scale the scores"
        )
    return value


def same_count(count: int, **lists: Sequence[Any]) -> None:
    """Refuse lists that do not go together row by row."""
    for name, rows in lists.items():
        if len(rows) != count:
            raise ValueError(f"{name} has {len(rows)} rows, expected {count} like queries")


def batch_count(count: int, *, batch_size: int, drop_last: bool) -> None:
    """A batch is full, unless the configuration keeps a shorter last one."""
    if count == batch_size or (not drop_last and count < batch_size):
        return
    expected = f"batch_size = {batch_size}" if drop_last else f"1 to batch_size = {batch_size}"
    hint = "; set drop_last=False in PPOConfig to train on a shorter last batch" if count < batch_size else ""
    raise ValueError(f"queries has {count} rows, expected {expected}{hint}")


def mask_rows(masks: Any, responses: Sequence[Tensor]) -> list[Tensor] | None:
    """Check one mask per response, of its length, holding 0/1 or booleans; returns boolean tensors on the CPU."""
    if masks is None:
        return None
    if isinstance(masks, Tensor | str | bytes) or not isinstance(masks, Sequence):
        raise ValueError(f"response_masks is a {type(masks).__name__}, expected a list of 1-d tensors or None")
    same_count(len(responses), response_masks=masks)
    masks = on_cpu(masks)
    for index, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        if not isinstance(mask, Tensor) or mask.shape != response.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"response_masks[{index}] is {shape}, expected {tuple(response.shape)} like responses[{index}]"
            )
        holds_numbers(f"response_masks[{index}]", mask)
        if mask.is_complex() or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"response_masks[{index}] holds other values than 0 and 1; 1 keeps a token")
    return [mask.bool() for mask in masks]


def fits_context(
    name: str, lengths: Sequence[int], limit: int | None, *, what: str, part: str = "", first: int = 0
) -> None:
    """Refuse rows longer than the model's context, or that of a part of it; the rows are counted from ``first``."""
    for index, length in enumerate(lengths, start=first):
        if limit is not None and length > limit:
            raise ValueError(
                f"{name}[{index}]: {what} is {length} tokens, but the model's{part} context is {limit}; "
                "shorten the prompt or generate fewer tokens"
            )


def fits_static_padding(lengths: Iterable[int], width: int, *, setting: str, what: str) -> None:
    """Refuse rows longer than a static width: cutting tokens off would train on other text than was scored."""
    for index, length in enumerate(lengths):
        if length > width:
            raise ValueError(
                f"row {index}: {what} is {length} tokens, but {setting} is {width}; raise {setting} in PPOConfig, "
                "shorten the row, or set pad_for_acceleration=False"
            )


def started_rows(
    responses: Sequence[Tensor], start: int | None, returned: Callable[[Tensor], bool]
) -> tuple[list[bool], bool]:
    """Which of an encoder-decoder's responses have the decoder's start token in front, and whether that is a guess.

    A model's own ``generate`` puts that token there; it is no choice of the policy. The trainer's does not, so that a
    response which it ``returned`` has none, whatever it begins with, and has one if it did so without its first token.
    Of the others the start token is taken for one that was put there only if *all* of them begin with it
    and go on, so that one which was sampled is kept.
    """
    led = [start is not None and len(response) > 1 and int(response[0]) == start for response in responses]
    if not any(led):
        return led, False
    unknown: list[int] = []
    for index, response in enumerate(responses):
        if returned(response):
            led[index] = False
        elif not (led[index] and returned(response[1:])):
            unknown.append(index)
    guessed = bool(unknown) and all(led[index] for index in unknown)
    if not guessed:
        for index in unknown:
            led[index] = False
    return led, guessed


def without_first_where(
    started: Sequence[bool], responses: Sequence[Tensor], masks: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Responses, and their masks likewise, without the first token of those that have a start token in front."""
    rows = [response[1:] if cut else response for response, cut in zip(responses, started, strict=True)]
    if masks is None:
        return rows, None
    return rows, [mask[1:] if cut else mask for mask, cut in zip(masks, started, strict=True)]
