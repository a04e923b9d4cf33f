"""Long prompts with short responses beside short prompts with long ones: every row has room, and so has its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_trainer


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2}], ids=["our loop", "transformers"])
def test_a_batch_outgrows_no_context(family: str, more: dict[str, Any]) -> None:
    trainer = make_trainer(family)
    context = trainer.model.config.max_position_embeddings
    assert context == tiny_model(family).config.max_position_embeddings
    long, short = torch.arange(3, 3 + context - 9) % 60 + 3, torch.arange(3, 8)
    lengths = iter([4, context - 14] * 2)
    responses = trainer.generate(
        [long] * 4 + [short] * 4,
        return_prompt=False,
        length_sampler=lambda: next(lengths),
        do_sample=True,
        eos_token_id=None,
        **more,
    )
    assert [len(response) for response in responses] == [4] * 4 + [context - 14] * 4
