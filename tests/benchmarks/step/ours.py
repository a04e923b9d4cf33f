"""The trainer of this repository, on a workload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.models.inner import transformers_model

from .flops import generation_flops, matrices_of, step_flops
from .parts import watched
from .workload import EPOCHS, LEARNING_RATE, RATIO_THRESHOLD, Batch, Work


def make_trainer(
    directory: str, work: Work, *, accel: str = "auto", optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
) -> PPOTrainer:
    """A trainer with a fresh policy in float32."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token

    def load() -> Any:
        return AutoModelForCausalLMWithValueHead.from_pretrained(directory, dtype=torch.float32)

    model, reference = load(), load() if work.shared is None else None
    config = PPOConfig(
        batch_size=work.batch,
        mini_batch_size=work.mini_batch,
        ppo_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        ratio_threshold=RATIO_THRESHOLD,
        seed=0,
        accel=accel,
    )
    return PPOTrainer(
        config,
        model,
        reference,
        tokenizer,
        optimizer=None if optimizer is None else optimizer(model.parameters()),
        num_shared_layers=work.shared,
    )


def backend(trainer: PPOTrainer) -> str:
    """What computes the frozen models."""
    return trainer.acceleration.backend


def needed_flops(trainer: PPOTrainer, work: Work, batch: Batch) -> int:
    """The arithmetic that the workload needs on this model."""
    matrices = matrices_of(transformers_model(trainer.model))
    prompts, responses = (sum(map(len, rows)) for rows in batch[:2])
    if work.new_tokens:
        return generation_flops(matrices, prompt_tokens=prompts, prompts=work.batch, new_tokens=work.new_tokens)
    return step_flops(matrices, tokens=prompts + responses, response_tokens=responses, epochs=EPOCHS)


def parts_of_a_step(trainer: PPOTrainer, batch: Batch) -> dict[str, float]:
    """Seconds of one more step, by part."""
    with watched(trainer) as watch:
        trainer.step(*batch)
    return watch.seconds


def step_in_order(trainer: PPOTrainer, work: Work, batch: Batch, seed: int) -> dict[str, float]:
    """One step that takes the rows in the order of :func:`.workload.orders`; its statistics."""
    # A step draws a permutation per epoch from this generator, and so those.
    trainer.shuffle.manual_seed(seed)
    return trainer.step(*batch)
