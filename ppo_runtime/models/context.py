"""What a model's configuration says of its rows: how long they may be, and what a decoder begins with."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_runtime.common import inputs
from ppo_runtime.models.inner import transformers_model


class Context(NamedTuple):
    """The most tokens a model takes; None where its configuration sets no limit.

    A decoder-only model reads prompt and response as one row. An encoder-decoder has positions for each.
    """

    row: int | None = None
    prompt: int | None = None
    response: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Context":
        """The limits of a model, a wrapper or a PEFT model."""
        config = transformers_model(model).config
        if not config.is_encoder_decoder:
            return cls(row=_positions(config, "max_position_embeddings"))
        return cls(
            prompt=_positions(config, "max_encoder_position_embeddings", getattr(config, "encoder", None)),
            response=_positions(config, "max_decoder_position_embeddings", getattr(config, "decoder", None)),
        )

    def check(
        self,
        prompts: Sequence[int],
        responses: Sequence[int],
        *,
        names: tuple[str, str],
        response: str,
        first: int = 0,
    ) -> None:
        """Refuse rows without room.

        Args:
            prompts: lengths.
            responses: likewise.
            names: of the arguments that hold prompts and responses.
            response: what a message calls a response.
            first: the number of the first row.

        Raises:
            ValueError: a row is longer than the model's context.
        """
        rows = [prompt + answer for prompt, answer in zip(prompts, responses, strict=True)]
        inputs.fits_context(names[0], rows, self.row, what=f"prompt + {response}", first=first)
        inputs.fits_context(names[0], prompts, self.prompt, what="the prompt", part=" encoder's", first=first)
        inputs.fits_context(names[1], responses, self.response, what=response, part=" decoder's", first=first)


def decoder_start(model: Any) -> int:
    """The token that an encoder-decoder's decoder begins with: its start token, or else BOS, as transformers has it.

    Raises:
        ValueError: the model's configurations name none.
    """
    inner = transformers_model(model)
    for field in ("decoder_start_token_id", "bos_token_id"):
        for config in (inner.generation_config, inner.config):
            token = getattr(config, field, None)
            if isinstance(token, int):
                return token
            if token is not None:
                raise ValueError(f"{field} of {type(inner).__name__} is {token!r}, expected one token id for all rows")
    raise ValueError(
        f"{type(inner).__name__} names neither decoder_start_token_id nor bos_token_id, expected one for its decoder "
        "to begin with; set decoder_start_token_id in its generation_config"
    )


def _positions(config: Any, field: str, part: Any = None) -> int | None:
    """The first limit that is there: the field's, that of a configuration of its own, the common one.

    Below 1 it says that there is none: XLNet's is -1.
    """
    for found in (
        getattr(config, field, None),
        getattr(part, "max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    ):
        if found is not None:
            return found if found >= 1 else None
    return None
