"""Where the rows of a generated batch end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StopStringCriteria


class Ending(StoppingCriteria):
    """Everything that ends one row before the others, as one criterion; it notes the length at which each row ended.

    What stands behind that is no choice of the policy: padding, or draws for a row that is over while others go on.
    Neither can be told from a response by its tokens, because padding may be the EOS or any other token. Lengths
    and times that end all rows together need no note: the batch is then as wide as its longest row.

    Beam search puts its rows in another order after every token; ask it for their lengths (`beam_lengths`).
    """

    def __init__(self, eos_token_ids: Sequence[int], criteria: Sequence[Any], *, prompt_width: int) -> None:
        self.eos_token_ids = torch.tensor(eos_token_ids, dtype=torch.long)
        self.criteria = criteria
        self.prompt_width = prompt_width
        self.lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Rows [B] that the newest token has ended."""
        last = input_ids[:, -1]
        self.eos_token_ids = self.eos_token_ids.to(last.device)
        ended = torch.isin(last, self.eos_token_ids)
        for criterion in self.criteria:
            ended = ended | _verdict(criterion, criterion(input_ids, scores, **kwargs), rows=len(last))
        if self.lengths is None or len(self.lengths) != len(last):
            self.lengths = torch.full_like(last, -1)
        width = input_ids.shape[1] - self.prompt_width
        self.lengths = torch.where(ended & (self.lengths < 0), width, self.lengths)
        return ended

    def cut(self, responses: Tensor) -> list[Tensor]:
        """Rows [B, T] without the prompt, each up to and including the token that ended it."""
        assert self.lengths is not None
        whole = responses.shape[1]
        return [
            row[: length if 0 <= length < whole else whole]
            for row, length in zip(responses, self.lengths.tolist(), strict=True)
        ]


def _verdict(criterion: Any, said: Any, *, rows: int) -> Any:
    """What a criterion returned: one truth value for each row, or one for all of them."""
    if isinstance(said, bool) or (
        isinstance(said, Tensor) and said.dtype == torch.bool and said.shape in ((rows,), (1,), ())
    ):
        return said
    name = getattr(criterion, "__name__", type(criterion).__name__)
    found = f"{said.dtype} {tuple(said.shape)}" if isinstance(said, Tensor) else repr(said)[:60]
    raise ValueError(
        f"stopping_criteria: {name} returned {found}, expected a boolean tensor ({rows},), True where a row is over"
    )


def criteria_of(stopping_criteria: Any, stop_strings: Any, tokenizer: Any) -> list[Any]:
    """The caller's criteria, one or a list of them, and the one that stop strings make."""
    several = stopping_criteria if isinstance(stopping_criteria, list | tuple) else [stopping_criteria]
    criteria = [criterion for criterion in several if criterion is not None]
    if stop_strings:
        try:
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
        except ValueError as refusal:
            raise ValueError(
                f"stop_strings is {stop_strings!r}, expected text that the tokenizer has tokens for: {refusal}"
            ) from refusal
    return criteria


def beam_lengths(beam_indices: Tensor) -> list[int]:
    """Tokens that beam search chose for each row: it notes the beam of each, and -1 behind them."""
    return (beam_indices >= 0).sum(-1).tolist()
