"""How many prompts are answered together, and in which order.

As many rows as half of the free memory holds, or of this process's share of it where several train on a CPU. A row is
taken to need, for each token of its prompt and response, twice the model's keys and values (while the cache grows, the
old and the new one are there), for each token of its prompt the activations of a layer, and four times the vocabulary
in single precision for choosing a token; where attention is eager, two numbers in single precision for every head and
every pair of its prompt's tokens as well. The longest prompt and the longest response count for all rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.common.memory import own_share
from ppo_runtime.models.inner import transformers_model

# Where nobody can tell what is free.
_UNKNOWN = 2**31
# Widths of activations that a layer holds at a time: queries, keys, values, attention, both sides of its gate.
_ACTIVATIONS = 12
_SINGLE = 4


def rows_together(model: Any, prompt: int, response: int, *, beams: int = 1) -> int:
    """How many rows of so many tokens are generated together, one at least."""
    inner = transformers_model(model)
    free = _free(inner.device) // 2
    return max(1, free // (beams * _row_bytes(inner, prompt, response)))


def by_length(queries: Sequence[Tensor]) -> list[int]:
    """The places of the queries from the longest to the shortest: rows of a batch then have little padding.

    The longest come first, so that a lack of memory shows at once.
    """
    return sorted(range(len(queries)), key=lambda place: -len(queries[place]))


def _row_bytes(inner: Any, prompt: int, response: int) -> int:
    """Bytes that one row takes, by the model's configuration."""
    config, size = inner.config.get_text_config(decoder=True), inner.dtype.itemsize
    hidden, layers, heads = (
        _number(config, name, default)
        for name, default in (("hidden_size", 4096), ("num_hidden_layers", 32), ("num_attention_heads", 32))
    )
    width = _number(config, "head_dim", max(hidden // heads, 1))
    cached = 2 * layers * _number(config, "num_key_value_heads", heads) * width * size
    choosing = 4 * _SINGLE * config.vocab_size
    eager = getattr(config, "_attn_implementation", None) == "eager"
    attention = 2 * _SINGLE * heads * prompt**2 if eager else 0
    return 2 * cached * (prompt + response) + _ACTIVATIONS * hidden * size * prompt + attention + choosing


def _number(config: Any, name: str, default: int) -> int:
    """A whole number of a configuration; some have several, one for each layer, or none."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else default


def _free(device: torch.device) -> int:
    """Bytes of memory that a tensor on this device could have."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    available = own_share() if device.type == "cpu" else None
    return _UNKNOWN if available is None else available
