"""TRL's small samplers."""

import random
from typing import Any

import torch
from torch import Tensor

from ppo_core.logprobs import restrict_to_support
from ppo_runtime.rollout.values import COUNT, whole


class LengthSampler:
    """Calls give an integer in [min_value, max_value), uniformly; ``set_seed`` seeds it.

    Raises:
        ValueError: the bounds are no whole numbers, or the interval is empty.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        integer = COUNT._replace(fits=lambda value: value >= 0, expected="a whole number from 0")
        min_value, max_value = whole("min_value", min_value, integer), whole("max_value", max_value, integer)
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

    Raises:
        ValueError: ``queries`` is no batch of token ids, or one of the numbers makes no sense.
    """
    if not isinstance(queries, Tensor) or queries.ndim != 2 or queries.dtype not in (torch.int64, torch.int32):
        shape = f"{queries.dtype} {tuple(queries.shape)}" if isinstance(queries, Tensor) else type(queries).__name__
        raise ValueError(f"queries is {shape}, expected a tensor of token ids [B, L]")
    txt_len = whole("txt_len", txt_len, COUNT)
    tokens = queries
    for _ in range(txt_len):
        output = model(tokens)
        logits = (output[0] if isinstance(output, tuple) else output.logits)[:, -1]
        allowed = restrict_to_support(logits, temperature=1.0, top_k=top_k, top_p=top_p)
        tokens = torch.cat((tokens, torch.multinomial(allowed.softmax(-1), 1)), dim=-1)
    return tokens[:, queries.shape[1] :]
