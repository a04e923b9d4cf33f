"""The reference's small samplers."""

import random
from typing import Any

import torch
from torch import Tensor

from ppo_core.logprobs import restrict_to_support


class LengthSampler:
    """Calls give an integer in [min_value, max_value), uniformly; ``set_seed`` seeds it.

    Raises:
        ValueError: the interval is empty.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        if max_value <= min_value:
            raise ValueError(
                f"max_value is {max_value}, expected more than min_value = {min_value}; it is not included"
            )
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        """A length."""
        return random.choice(self.values)


@torch.no_grad()
def respond_to_batch(model: Any, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sample ``txt_len`` tokens after each row of ``queries`` [B, L], without padding or EOS; [B, txt_len].

    One full forward pass per token: for anything but a toy, use ``PPOTrainer.generate``.
    """
    tokens = queries
    for _ in range(txt_len):
        output = model(tokens)
        logits = (output[0] if isinstance(output, tuple) else output.logits)[:, -1]
        allowed = restrict_to_support(logits, temperature=1.0, top_k=top_k, top_p=top_p)
        tokens = torch.cat((tokens, torch.multinomial(allowed.softmax(-1), 1)), dim=-1)
    return tokens[:, queries.shape[1] :]
