"""The trainer of this repository, on a workload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ppo_runtime
from ppo_runtime.models.inner import transformers_model

from .flops import generation_flops, matrices_of, step_flops
from .parts import watched
from .workload import EPOCHS, Batch, Work, build_trainer


def make_trainer(
    directory: str, work: Work, *, accel: str = "auto", optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
) -> ppo_runtime.PPOTrainer:
    """A trainer with a fresh policy in float32."""
    return build_trainer(ppo_runtime, directory, work, optimizer, {"dtype": torch.float32}, accel=accel)


def backend(trainer: ppo_runtime.PPOTrainer) -> str:
    """What computes the frozen models."""
    return trainer.acceleration.backend


def needed_flops(trainer: ppo_runtime.PPOTrainer, work: Work, batch: Batch) -> int:
    """The arithmetic that the workload needs on this model."""
    matrices = matrices_of(transformers_model(trainer.model))
    prompts, responses = (sum(map(len, rows)) for rows in batch[:2])
    if work.new_tokens:
        return generation_flops(matrices, prompt_tokens=prompts, prompts=work.batch, new_tokens=work.new_tokens)
    return step_flops(matrices, tokens=prompts + responses, response_tokens=responses, epochs=EPOCHS)


def parts_of_a_step(trainer: ppo_runtime.PPOTrainer, batch: Batch) -> dict[str, float]:
    """Seconds of one more step, by part."""
    with watched(trainer) as watch:
        trainer.step(*batch)
    return watch.seconds


def step_in_order(trainer: ppo_runtime.PPOTrainer, work: Work, batch: Batch, seed: int) -> dict[str, float]:
    """One step that takes the rows in the order of :func:`.workload.orders`; its statistics."""
    # A step draws a permutation per epoch from this generator, and so those.
    trainer.shuffle.manual_seed(seed)
    return trainer.step(*batch)
