"""Long prompts with short responses beside short prompts with long ones: every row has room, and so has its batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ppo_runtime.rollout import generating
from tests.runtime.support.tiny import EOS_ID, tiny_model
from tests.runtime.support.trainers import make_trainer


def sampled_lengths(trainer: Any, queries: list[torch.Tensor], lengths: Iterator[int], **options: Any) -> list[int]:
    """Of the responses to queries for which these lengths are drawn."""
    responses = trainer.generate(
        queries,
        return_prompt=False,
        length_sampler=lambda: next(lengths),
        do_sample=True,
        eos_token_id=None,
        **options,
    )
    return [len(response) for response in responses]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2}], ids=["our loop", "transformers"])
def test_a_batch_outgrows_no_context(family: str, more: dict[str, Any]) -> None:
    trainer = make_trainer(family)
    context = trainer.model.config.max_position_embeddings
    assert context == tiny_model(family).config.max_position_embeddings
    long, short = torch.arange(3, 3 + context - 9) % 60 + 3, torch.arange(3, 8)
    lengths = iter([4, context - 14] * 2)
    assert sampled_lengths(trainer, [long] * 4 + [short] * 4, lengths, **more) == [4] * 4 + [context - 14] * 4


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2}], ids=["our loop", "transformers"])
def test_a_batch_outgrows_no_context_however_many_rows_memory_holds(
    rows: int, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "rows_together", lambda *_, **__: rows)
    trainer = make_trainer("gpt2")
    context = trainer.model.config.max_position_embeddings
    long, short = torch.arange(context - 12) % 60 + 3, torch.arange(context - 14) % 60 + 3
    lengths = iter([4, 14])
    assert sampled_lengths(trainer, [long] * 4 + [short] * 4, lengths, **more) == [4] * 4 + [14] * 4


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("rows", [None, 4])
def test_a_forced_last_token_stands_at_every_end(family: str, rows: int | None) -> None:
    trainer = make_trainer(family)
    lengths = iter([4, 9])
    responses = trainer.generate(
        [torch.arange(3, 9)] * 8,
        lambda: next(lengths),
        rows,
        return_prompt=False,
        do_sample=True,
        suppress_tokens=[EOS_ID],
        forced_eos_token_id=7,
        eos_token_id=None,
    )
    assert [(len(response), int(response[-1])) for response in responses] == [(4, 7)] * 4 + [(9, 7)] * 4
