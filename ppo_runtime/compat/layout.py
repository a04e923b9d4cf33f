"""TRL's ``model_inputs``: a padded batch as a dictionary, and where the responses lie in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.common.inputs import without_first_where
from ppo_runtime.learning.forward import Rows


def model_inputs_of(rows: Rows, start: int | None) -> dict[str, Tensor]:
    """What the model's forward takes, of rows laid out without response masks."""
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    if start is not None:
        first = torch.full_like(rows.tokens[:, :1], start)
        inputs["decoder_input_ids"] = torch.cat((first, rows.tokens), dim=1)
        real = torch.cat((torch.ones_like(first, dtype=torch.bool), rows.mask), dim=1)
        inputs["decoder_attention_mask"] = real.to(rows.attention_mask.dtype)
    return inputs


def rows_of(
    model_inputs: Mapping[str, Any],
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    *,
    start: int | None,
) -> Rows:
    """Rows whose time axis is the padded text's without its first token: entry t is about token t + 1.

    Padding may lie on the left or on the right; responses are found by the lengths of prompts and responses.

    Raises:
        ValueError: ``model_inputs`` holds more or fewer tokens than prompt and response have.
    """
    text, real = ("input_ids", "attention_mask") if start is None else ("decoder_input_ids", "decoder_attention_mask")
    tokens, attention = model_inputs[text], model_inputs[real]
    started = [
        start is not None and _holds_without_first(tokens[row][attention[row] != 0], response, start)
        for row, response in enumerate(responses)
    ]
    responses, masks = without_first_where(started, responses, response_masks)
    kept = torch.zeros(tokens.shape[0], tokens.shape[1], dtype=torch.bool)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        before = len(query) if start is None else 1
        present = attention[row].nonzero().flatten()
        if len(present) != before + len(response):
            raise ValueError(
                f"model_inputs[{real!r}][{row}] marks {len(present)} tokens, expected {before + len(response)}: "
                f"{before} before the response and {len(response)} in it; make it with prepare_model_inputs"
            )
        begin = int(present[0]) + before
        kept[row, begin : begin + len(response)] = True if masks is None else masks[row][: len(response)].bool().cpu()
    kept = kept.to(tokens.device)
    places = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    return Rows(
        model_inputs["input_ids"],
        model_inputs["attention_mask"],
        None if start is None else tokens[:, :-1],
        places,
        tokens[:, 1:],
        kept[:, 1:],
        lengths=[model_inputs["input_ids"].shape[1]] * len(tokens),
        times=[tokens.shape[1] - 1] * len(tokens),
        static=True,
    )


def _holds_without_first(read: Tensor, response: Tensor, start: int) -> bool:
    """Whether what a decoder reads is the response itself, whose first token is then the decoder's start token."""
    return len(read) == len(response) and int(response[0]) == start and bool((read == response.to(read.device)).all())
