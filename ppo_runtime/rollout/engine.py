"""Responses from a model: batches of padded prompts in, the tokens that were chosen out."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

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


def padded(
    rows: Sequence[Tensor], pad_token_id: int, *, side: Literal["left", "right"], width: int = 0
) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] padded on one side to ``width`` at least, and a mask made from lengths, never from token ids."""
    ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    missing = max(width - ids.shape[1], 0)
    more = (missing, 0) if side == "left" else (0, missing)
    return F.pad(ids, more, value=pad_token_id), F.pad(mask, more)


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
    side: Literal["left", "right"] = "right" if encoder_decoder else "left"
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
        prompts = queries[start : start + plan.batch_size]
        ids, mask = padded(prompts, plan.pad_token_id, side=side, width=plan.prompt_width)
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
