"""Trainers of the user's own: classes above ours, and attributes that are assigned."""

from __future__ import annotations

import io
from typing import Any

from datasets import Dataset
from rich.console import Console

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.loop import train
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch


def _made(kind: type[PPOTrainer], **settings: Any) -> Any:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 6})
    return kind(PPOConfig(**(SETTINGS | settings)), model, None, tiny_tokenizer(), dataset)


def _train(trainer: PPOTrainer, steps: int) -> None:
    train(trainer, lambda _, responses: [0.0] * len(responses), steps=steps, console=Console(file=io.StringIO()))


def test_a_class_may_have_trackers_of_its_own() -> None:
    class Kept:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, step: int, *_: Any) -> None:
            self.steps.append(step)

    class Own(PPOTrainer):
        kept = Kept()

        @property
        def trackers(self) -> list[Any]:
            return [self.kept]

    trainer = _made(Own)
    queries, responses, scores = make_batch()
    trainer.log_stats(trainer.step(queries, responses, scores), {}, scores)
    _train(trainer, 2)
    assert Own.kept.steps == [1, 2]
