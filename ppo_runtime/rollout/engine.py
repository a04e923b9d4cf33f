"""Responses from a model: batches of padded prompts in, the tokens that were chosen out."""

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ppo_runtime.rollout import decoding
from ppo_runtime.rollout.ending import Ending, beam_lengths
from ppo_runtime.rollout.obstacles import obstacle
from ppo_runtime.rollout.plan import Plan, padded
from ppo_runtime.rollout.settings import Settings

logger = logging.getLogger(__name__)


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

    :mod:`ppo_runtime.rollout.decoding` makes them where nothing speaks against it, else transformers' ``generate``.

    Args:
        model: a wrapper or a transformers model.
        queries: prompts, on the model's device.
        settings: those in force.
        plan: padding, batches, and what ends a row.
        new_tokens: most tokens of each batch of queries; None leaves that to the settings. What is longer than
            ``plan.most`` has it is cut off by the caller.
        ours: settings in place of others.
    """
    why = obstacle(model, settings, plan, new_tokens, ours)
    if why is None:
        return decoding.decode(model, queries, settings, plan, new_tokens, ours)
    logger.debug("responses are made by transformers' generate: %s", why)
    return _by_transformers(model, queries, settings, plan, new_tokens, ours)


def _by_transformers(
    model: Any,
    queries: Sequence[Tensor],
    settings: Settings,
    plan: Plan,
    new_tokens: Sequence[int | None],
    ours: dict[str, Any],
) -> list[Tensor]:
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
