"""How much arithmetic a workload needs: products with weight matrices, at real tokens, where a result depends on them.

A matrix of P entries takes 2 P operations per token in a forward pass and 4 P in a backward pass, half of these for
the gradient of its input and half for its own. With T tokens in all rows, R of them in responses, and E epochs, a step
needs

    trunk, trained        2 P T (2 + 3 E)     scored by policy and reference, then trained on in each epoch
    trunk, frozen         2 P T               policy and reference share it, and it never changes: once
    head, trained         2 P R (2 + 3 E)
    head, frozen          2 P R (2 + 2 E)     its input is not shared, and gets a gradient

and n new tokens for B prompts of T tokens together need 2 P (T + B (n - 1)) in the trunk and 2 P B n in the head.
Nothing is counted for attention between tokens, norms, embeddings, the softmax, the value head and the optimiser, nor
for padding or for anything computed twice: what they cost counts against efficiency.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class Matrices(NamedTuple):
    """Entries of a model's weight matrices."""

    frozen: int
    """In the trunk, without gradient."""
    trained: int
    """In the trunk, with gradient."""
    head: int
    head_trains: bool


def matrices_of(model: Any) -> Matrices:
    """Count the matrices of a transformers model as it stands; embeddings are looked up, not multiplied with."""
    looked_up = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trunk = [p for p in model.base_model.parameters() if p.ndim > 1 and id(p) not in looked_up]
    trained = sum(p.numel() for p in trunk if p.requires_grad)
    head = model.get_output_embeddings().weight
    return Matrices(sum(p.numel() for p in trunk) - trained, trained, head.numel(), head.requires_grad)


def step_flops(matrices: Matrices, *, tokens: int, response_tokens: int, epochs: int) -> int:
    """Of one PPO step, by the module's formula."""
    trunk = matrices.trained * (2 + 3 * epochs) + matrices.frozen
    head = matrices.head * (2 + (3 if matrices.head_trains else 2) * epochs)
    return 2 * (trunk * tokens + head * response_tokens)


def generation_flops(matrices: Matrices, *, prompt_tokens: int, prompts: int, new_tokens: int) -> int:
    """Of one call of `generate`, by the module's formula: the last new token is never read."""
    trunk = (matrices.trained + matrices.frozen) * (prompt_tokens + prompts * (new_tokens - 1))
    return 2 * (trunk + matrices.head * prompts * new_tokens)
