"""Responses from a policy: left-padded generation, cut at the first EOS of the response."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ppo_runtime.inner import pretrained_model


@attrs.frozen
class SamplingSpec:
    """How tokens were drawn; anything but the defaults changes the distribution that PPO's ratio is about."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, model: Any, generation_kwargs: dict[str, Any]) -> "SamplingSpec":
        """The settings in force: the caller's, else those of the model's generation config, else none."""

        def setting(name: str, neutral: float) -> float:
            value = _setting(model, generation_kwargs, name)
            return neutral if value is None else value

        return cls(
            temperature=float(setting("temperature", 1.0)),
            top_k=int(setting("top_k", 0)),
            top_p=float(setting("top_p", 1.0)),
        )

    @classmethod
    def plain_unless_asked(cls, model: Any, generation_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The caller's settings, and neutral ones where neither caller nor model has any but tokens are sampled.

        transformers fills these gaps with defaults of its own, top_k=50 among them.
        """
        if not _setting(model, generation_kwargs, "do_sample"):
            return dict(generation_kwargs)
        gaps = [f for f in attrs.fields(cls) if _setting(model, generation_kwargs, f.name) is None]
        return generation_kwargs | {field.name: field.default for field in gaps}

    def departures(self) -> list[str]:
        """The settings under which what is sampled is not what plain log-probabilities score."""
        neutral = SamplingSpec()
        return [
            f"{field.name}={getattr(self, field.name)}"
            for field in attrs.fields(SamplingSpec)
            if getattr(self, field.name) != getattr(neutral, field.name)
        ]


def _setting(model: Any, generation_kwargs: dict[str, Any], name: str) -> Any:
    """The caller's setting, else that of the generation config; None if both leave it open."""
    value = generation_kwargs.get(name)
    config = generation_kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return getattr(config, name, None) if value is None else value


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


def cut_at_eos(response: Tensor, eos_token_ids: Iterable[int]) -> Tensor:
    """The response up to and including its first EOS; all of it if there is none."""
    ends = torch.isin(response, torch.tensor(sorted(eos_token_ids), dtype=response.dtype, device=response.device))
    first = ends.nonzero()
    return response[: int(first[0]) + 1] if len(first) else response


@torch.no_grad()
def generate_responses(
    model: Any,
    queries: Sequence[Tensor],
    *,
    batch_size: int,
    pad_token_id: int,
    eos_token_ids: Iterable[int],
    length_sampler: Callable[[], int] | None,
    is_encoder_decoder: bool,
    generation_kwargs: dict[str, Any],
    prompt_width: int = 0,
) -> list[Tensor]:
    """One response per query, without the prompt, ending with its EOS where one was drawn.

    The prompt is cut off by its length, so an EOS inside it does no harm, and neither does pad == eos. Prompts are
    padded to ``prompt_width`` at least.
    """
    responses: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        # Encoders count positions from the row's first entry, padding or not, and so the step reads them too.
        pad = right_pad if is_encoder_decoder else left_pad
        ids, mask = pad(queries[start : start + batch_size], pad_token_id, width=prompt_width)
        kwargs = SamplingSpec.plain_unless_asked(pretrained_model(model), generation_kwargs)
        if length_sampler is not None:
            kwargs["max_new_tokens"] = length_sampler()
        sequences = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad_token_id, **kwargs)
        # A decoder of its own starts from one start token; otherwise the prompt comes first.
        prompt_length = 1 if is_encoder_decoder else ids.shape[1]
        responses += [cut_at_eos(row[prompt_length:], eos_token_ids) for row in sequences]
    return responses
