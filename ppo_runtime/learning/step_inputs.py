"""What ``step`` is given: checked, and laid out as the model reads it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ppo_runtime.common import inputs
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.forward import Rows, lay_out
from ppo_runtime.models.context import Context, decoder_start
from ppo_runtime.models.inner import has_encoder


def check_batch(
    queries: Any, responses: Any, scores: Any, response_masks: Any, *, model: Any, config: PPOConfig
) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor] | None]:
    """Queries, responses, scores [B] and masks that go together, by name otherwise."""
    vocab_size = model.config.vocab_size
    queries = inputs.token_rows("queries", queries, vocab_size=vocab_size)
    responses = inputs.token_rows("responses", responses, vocab_size=vocab_size)
    inputs.same_count(len(queries), responses=responses)
    inputs.batch_count(len(queries), batch_size=config.batch_size, drop_last=config.drop_last)
    scores = inputs.score_vector(scores, count=len(queries))
    return queries, responses, scores, inputs.mask_rows(response_masks, responses)


def check_lengths(queries: Sequence[Tensor], responses: Sequence[Tensor], model: Any) -> None:
    """Refuse rows that are longer than the model's context."""
    lengths = [len(query) for query in queries], [len(response) for response in responses]
    Context.of(model).check(*lengths, names=("queries", "responses"), response="response")


def start_token(model: Any) -> int | None:
    """The token that the decoder of an encoder-decoder begins with; None for other models."""
    return decoder_start(model) if has_encoder(model) else None


def lay_out_batch(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    masks: Any,
    *,
    model: Any,
    config: PPOConfig,
    pad_token_id: int,
) -> Rows:
    """The batch as the model reads it; as wide as the static padding asks for."""
    encoder_decoder = has_encoder(model)
    input_width = response_width = 0
    if config.pad_for_acceleration and encoder_decoder:
        input_width, response_width = config.pad_max_input_len, config.pad_max_len
        inputs.fits_static_padding(map(len, queries), input_width, setting="pad_max_input_len", what="the prompt")
        inputs.fits_static_padding(map(len, responses), response_width, setting="pad_max_len", what="the response")
    elif config.pad_for_acceleration:
        input_width = config.pad_max_len
        lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
        inputs.fits_static_padding(lengths, input_width, setting="pad_max_len", what="prompt + response")
    return lay_out(
        queries,
        responses,
        masks,
        pad_token_id=pad_token_id,
        decoder_start_token_id=start_token(model),
        device=model.device,
        input_width=input_width,
        response_width=response_width,
    )
