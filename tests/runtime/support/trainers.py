"""A tiny trainer and a batch for it, the same for the same seed."""

from typing import Any

import torch
from torch import Tensor

from ppo_runtime import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.ranks.seeding import set_seed
from tests.runtime.support.tiny import SEQ2SEQ_FAMILIES, tiny_model, tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "batch_size": 6,
    "mini_batch_size": 2,
    "learning_rate": 1e-3,
    "accel": "eager",
}


def make_trainer(
    family: str = "llama",
    *,
    ref_model: Any = None,
    tokenizer: Any = None,
    dataset: Any = None,
    optimizer_of: Any = None,
    num_shared_layers: int | None = None,
    dropout: float = 0.0,
    layers: int = 2,
    peft_config: Any = None,
    placed: Any = None,
    adam_eps: float | None = None,
    **settings: Any,
) -> PPOTrainer:
    """A trainer around a tiny random model; ``settings`` go to PPOConfig.

    ``placed`` moves the model to where it shall be. ``adam_eps`` is for runs that are compared up to rounding: Adam
    divides a gradient by its own size, so with its usual 1e-8 the rounding of one that is almost zero moves a weight
    by a good part of the learning rate, more on one processor than on another.
    """
    set_seed(0)
    parent = AutoModelForSeq2SeqLMWithValueHead if family in SEQ2SEQ_FAMILIES else AutoModelForCausalLMWithValueHead
    model = parent.from_pretrained(tiny_model(family, dropout=dropout, layers=layers), peft_config=peft_config)
    model = model if placed is None else placed(model)
    trainer = PPOTrainer(
        PPOConfig(**(SETTINGS | settings)),
        model,
        ref_model,
        tokenizer or tiny_tokenizer(),
        dataset,
        optimizer=None if optimizer_of is None else optimizer_of(model),
        num_shared_layers=num_shared_layers,
    )
    for group in trainer.optimizer.param_groups if adam_eps is not None else ():
        group["eps"] = adam_eps
    return trainer


def untimed(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics that two equal runs have in common."""
    return {name: value for name, value in stats.items() if not name.startswith("time/") and name != "run"}


def make_batch(size: int = 6, *, seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ragged queries and responses, and scores."""
    generator = torch.Generator().manual_seed(seed)

    def rows(low: int, high: int) -> list[Tensor]:
        lengths = torch.randint(low, high, (size,), generator=generator).tolist()
        return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]

    return rows(1, 6), rows(1, 9), list(torch.randn(size, generator=generator))
