"""What is measured, the same for whoever runs it: token ids of rows and prompts, and a trainer's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

EPOCHS = 4
LEARNING_RATE = 1e-5
RATIO_THRESHOLD = 1e9
"""Out of reach: beyond it ours leaves an update out and the peer steps on stale moments, which is neither the same work
nor the same result. Random tokens do go beyond the default of 10."""
PROMPTS = (8, 24)
"""Shortest and longest prompt, in tokens."""
SHORTEST = 8
"""Tokens of the shortest response that is trained on."""


class Work(NamedTuple):
    """A workload; prompts and responses are of random lengths, so that rows are ragged."""

    batch: int
    mini_batch: int
    longest: int
    """Tokens of the longest response that may be drawn."""
    shared: int | None = None
    """Bottom layers that policy and reference share, frozen in both; None: a reference loaded beside the policy."""
    new_tokens: int = 0
    """Tokens to generate for each prompt; 0: the workload is a step."""


WORKS = {
    "W1": Work(batch=8, mini_batch=4, longest=48),
    "W2": Work(batch=16, mini_batch=4, longest=128),
    "W3": Work(batch=16, mini_batch=4, longest=128, shared=24),
    "W4": Work(batch=16, mini_batch=4, longest=128, new_tokens=48),
}

Batch = tuple[list[Tensor], list[Tensor], list[Tensor]]


def make_batch(work: Work, vocabulary: int) -> Batch:
    """Queries, responses and scores; tokens are uniform, without the three lowest, which are special in many models."""
    generator = torch.Generator().manual_seed(1)

    def texts(shortest: int, longest: int) -> list[Tensor]:
        lengths = torch.randint(shortest, longest + 1, (work.batch,), generator=generator).tolist()
        return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]

    queries, responses = texts(*PROMPTS), texts(SHORTEST, work.longest)
    return queries, responses, [torch.randn((), generator=generator) for _ in range(work.batch)]


def build_trainer(
    library: Any,
    directory: str,
    work: Work,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None,
    precision: dict[str, torch.dtype],
    **settings: Any,
) -> Any:
    """A trainer with a fresh policy, of a library that has TRL's names; its own optimiser if none is given."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token

    def load() -> Any:
        return library.AutoModelForCausalLMWithValueHead.from_pretrained(directory, **precision)

    model, reference = load(), load() if work.shared is None else None
    config = library.PPOConfig(
        batch_size=work.batch,
        mini_batch_size=work.mini_batch,
        ppo_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        ratio_threshold=RATIO_THRESHOLD,
        seed=0,
        **settings,
    )
    return library.PPOTrainer(
        config,
        model,
        reference,
        tokenizer,
        optimizer=None if optimizer is None else optimizer(model.parameters()),
        num_shared_layers=work.shared,
    )


def sampling(work: Work, pad_token_id: int) -> dict[str, Any]:
    """What `generate` is asked for: plain sampling, and as many tokens for every prompt."""
    return {
        "return_prompt": False,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": work.new_tokens,
        "min_new_tokens": work.new_tokens,
        "pad_token_id": pad_token_id,
    }


def orders(work: Work, seed: int) -> list[Tensor]:
    """The order of the rows in every epoch, where both sides shall take the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(work.batch, generator=generator) for _ in range(EPOCHS)]


@torch.no_grad()
def set_start(model: Any) -> None:
    """Set a value-head model's weights to a start that both sides have in common.

    They would draw the value head from distributions of their own. The policy is moved away from its reference, from
    which its KL would be 0 otherwise.
    """
    head = model.v_head.summary
    head.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(2))
    head.bias.zero_()
    for parameter in model.pretrained_model.parameters():
        parameter.mul_(1.01)
