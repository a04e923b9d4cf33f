"""Trainers of the user's own: classes above ours, and attributes that are assigned."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.loop import train
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, untimed


def _made(kind: type[PPOTrainer], **settings: Any) -> Any:
    torch.manual_seed(0)
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


def test_a_class_may_use_names_that_are_no_attributes_of_ours() -> None:
    """Words that a class of one's own is likely to have; what a trainer is given by these names, it keeps by others."""

    class Own(PPOTrainer):
        @property
        def log(self) -> str:
            return "log"

        def advantages(self) -> str:
            return "advantages"

        def policy_loss(self) -> str:
            return "loss"

        @property
        def keeper(self) -> str:
            return "keeper"

        @property
        def engine(self) -> str:
            return "engine"

    expected, found = _made(PPOTrainer), _made(Own)
    for trainer in (expected, found):
        torch.manual_seed(0)
        trainer.generate(torch.tensor([5, 6]), max_new_tokens=2, do_sample=True, top_k=0)
    np.testing.assert_equal(*(untimed(trainer.step(*make_batch())) for trainer in (expected, found)))
    assert [found.log, found.advantages(), found.policy_loss(), found.keeper, found.engine] == [
        "log",
        "advantages",
        "loss",
        "keeper",
        "engine",
    ]
