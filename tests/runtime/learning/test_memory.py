"""What a step holds: beyond the logits it may keep, nothing with a vocabulary axis for the tokens of a whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ppo_runtime import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
)
from ppo_runtime.learning import forward
from ppo_runtime.models.heads import LMHead
from tests.operations import Largest, Operations
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch

VOCABULARY, WIDTH = 2000, 16


def largest_in_a_step(family: str = "llama", *, lora: bool = False, **settings: Any) -> tuple[Largest, int]:
    """The largest tensor of a step that isn't shaped like the embeddings, and how many entries [B, T, V] has."""
    parent = AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead
    base = tiny_model(family, vocab_size=VOCABULARY)
    model = parent.from_pretrained(base, peft_config=tiny_lora(family) if lora else None)
    fields: dict[str, Any] = SETTINGS | {"ppo_epochs": 1} | settings
    trainer = PPOTrainer(PPOConfig(**fields), model, None, tiny_tokenizer())
    queries, responses, scores = make_batch()
    with Operations() as operations:
        trainer.step(queries, responses, scores)
    return operations.largest((VOCABULARY, WIDTH)), len(responses) * max(map(len, responses)) * VOCABULARY


@pytest.mark.parametrize(
    "case",
    [{}, {"kl_penalty": "full"}, {"family": "t5"}, {"lora": True}, {"mini_batch_size": 6}],
    ids=["llama", "full KL", "t5", "LoRA", "one minibatch"],
)
def test_no_tensor_of_a_step_has_a_vocabulary_for_every_token(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forward.HEAD_CHUNK, "cpu", 128)
    monkeypatch.setitem(forward.KEPT_LOGITS, "cpu", 0)
    monkeypatch.setattr(forward, "FULL_KL_ROWS", 4)
    largest, whole = largest_in_a_step(**case)
    assert largest.numel < whole / 2, f"{largest.operator} made {tuple(largest.shape)}"


@pytest.mark.parametrize(
    ("learning", "room", "kept"),
    [((), 0, False), (("hidden",), 0, True), (("weight",), 0, True), (("hidden", "weight"), -1, False)],
    ids=["no gradient", "a frozen head", "a frozen trunk", "a byte too many"],
)
def test_logits_are_kept_for_a_gradient_while_they_fit(
    learning: tuple[str, ...], room: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 7, 300
    monkeypatch.setitem(forward.HEAD_CHUNK, "cpu", 10)
    monkeypatch.setitem(forward.KEPT_LOGITS, "cpu", rows * vocabulary * 4 + room)
    hidden = torch.randn(rows, WIDTH, requires_grad="hidden" in learning)
    weight = torch.randn(vocabulary, WIDTH, requires_grad="weight" in learning)
    head, tokens = LMHead(weight, None, None, 1.0), torch.arange(rows)

    def holds_logits() -> bool:
        with Operations() as operations:
            forward.head_output(head, hidden, tokens)
        return operations.largest(weight.shape).numel == rows * vocabulary

    assert holds_logits() == kept
    with torch.no_grad():
        assert not holds_logits()


def test_the_observer_sees_logits() -> None:
    """Both in forward and in backward: the mode that the other tests rely on."""
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(300, 16)
    with Operations() as forwards:
        loss = (hidden @ weight.T).sum()
    assert forwards.largest(weight.shape).shape == (7, 300)
    with Operations() as backwards:
        loss.backward()
    assert backwards.largest(weight.shape).numel == 7 * 300
