"""Responses from a model: batches of padded prompts in, the tokens that were chosen out."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from ppo_runtime.rollout.ending import Ending, beam_lengths
from ppo_runtime.rollout.settings import Settings


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


class Engine(Protocol):
    """Responses from a model: one per query, without the prompt, ending with the token that ended it."""

    def __call__(
        self,
        model: Any,
        queries: Sequence[Tensor],
        settings: Settings,
        plan: Plan,
        new_tokens: Sequence[int | None],
        ours: dict[str, Any],
    ) -> list[Tensor]:
        """See :func:`generate_responses`, which is the default."""
        ...


def left_pad(rows: Sequence[Tensor], pad_token_id: int, *, width: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] padded on the left to ``width`` at least, and a mask made from lengths, never from token ids."""
    return _pad(rows, pad_token_id, width, first=lambda length, row: length - len(row))


def right_pad(rows: Sequence[Tensor], pad_token_id: int, *, width: int = 0) -> tuple[Tensor, Tensor]:
    """The same with padding on the right."""
    return _pad(rows, pad_token_id, width, first=lambda _length, _row: 0)


def _pad(
    rows: Sequence[Tensor], pad_token_id: int, width: int, *, first: Callable[[int, Tensor], int]
) -> tuple[Tensor, Tensor]:
    length = max(width, *(len(row) for row in rows))
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start = first(length, row)
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return ids, mask


@torch.no_grad()
def generate_responses(
    model: Any,
    queries: Sequence[Tensor],
    settings: Settings,
    plan: Plan,
    new_tokens: Sequence[int | None],
    ours: dict[str, Any],
) -> list[Tensor]:
    """One response per query, without the prompt, ending with the token that ended it.

    The prompt is cut off by its length and what follows the response by where generation ended the row, so an EOS
    inside the prompt does no harm, and neither does pad == eos.

    Args:
        model: a wrapper or a transformers model.
        queries: prompts, on the model's device.
        settings: those in force.
        plan: padding, batches, and what ends a row.
        new_tokens: most tokens of each batch of queries; None leaves that to the settings.
        ours: settings in place of others.
    """
    responses: list[Tensor] = []
    encoder_decoder = plan.decoder_start_token_id is not None
    # Encoders count positions from the row's first entry, padding or not, and so the step reads them too.
    pad = right_pad if encoder_decoder else left_pad
    beams = (settings["num_beams"] or 1) > 1
    common: dict[str, Any] = {
        "pad_token_id": plan.pad_token_id,
        "eos_token_id": list(plan.eos_token_ids) or None,
        "stop_strings": None,  # among the criteria
        "return_dict_in_generate": beams,
    }
    if encoder_decoder:
        # The step scores behind this token, so no other may be in force in the policy or the reference.
        common["decoder_start_token_id"] = plan.decoder_start_token_id
    for most, start in zip(new_tokens, range(0, len(queries), plan.batch_size), strict=True):
        ids, mask = pad(queries[start : start + plan.batch_size], plan.pad_token_id, width=plan.prompt_width)
        # A decoder of its own starts from one start token; otherwise the prompt comes first.
        prompt_width = 1 if encoder_decoder else ids.shape[1]
        ending = Ending(plan.eos_token_ids, plan.criteria, prompt_width=prompt_width)
        more = {"stopping_criteria": [ending]} | ({} if most is None else {"max_new_tokens": most})
        output = settings.generate(model, input_ids=ids, attention_mask=mask, **(ours | common | more))
        if beams:
            rows = output.sequences[:, prompt_width:]
            lengths = beam_lengths(output.beam_indices)
            responses += [row[:length] for row, length in zip(rows, lengths, strict=True)]
        else:
            responses += ending.cut(output[:, prompt_width:])
    return responses
