"""TRL's classic PPOTrainer (0.11.4), on the same workload; imports nothing of this repository but that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import trl

from .workload import Batch, Work, build_trainer, orders


def make_trainer(
    directory: str, work: Work, *, accel: str = "auto", optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
) -> Any:
    """A trainer with a fresh policy in float32; ``accel`` is ours and says nothing here."""
    return build_trainer(trl, directory, work, optimizer, {"torch_dtype": torch.float32})


def backend(trainer: Any) -> str:
    """What computes the models."""
    return "eager"


def step_in_order(trainer: Any, work: Work, batch: Batch, seed: int) -> dict[str, float]:
    """One step that takes the rows in the order of :func:`.workload.orders`; its statistics, as ours are defined.

    The statistics of the updates come as means of means over minibatches. They are averaged anew here, each minibatch
    weighted by its tokens.
    """
    drawn = [order.numpy() for order in orders(work, seed)]
    names = ("loss/policy", "loss/value", "policy/approxkl", "policy/clipfrac")
    totals, tokens, train = dict.fromkeys(names, 0.0), 0.0, trainer.train_minibatch

    def recorded(old_logprobs: Any, values: Any, logprobs: Any, logits: Any, vpreds: Any, mask: Any, *rest: Any) -> Any:
        nonlocal tokens
        stats = train(old_logprobs, values, logprobs, logits, vpreds, mask, *rest)
        tokens += float(mask.sum())
        for name in names:
            totals[name] += float(stats[name]) * float(mask.sum())
        return stats

    with (
        mock.patch.object(np.random, "permutation", side_effect=drawn),
        mock.patch.object(trainer, "train_minibatch", recorded),
    ):
        stats = trainer.step(*batch)
    return stats | {f"ppo/{name}": total / tokens for name, total in totals.items()}
