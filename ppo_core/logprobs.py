"""Log-probabilities and entropies from logits."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ppo_core._checks import check_floating, check_integer, check_same_shape, widen


def token_logprobs(
    logits: Float[Tensor, "*batch time vocab"], tokens: Int64[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """log softmax(logits)[token], in nats, without building the whole log-softmax.

    logits_token - logsumexp(logits)

    Args:
        logits: unnormalised scores; ``logits[..., t, :]`` predicts ``tokens[..., t]``. -inf rules a token out.
        tokens: token ids in [0, vocab).

    Returns:
        [*batch, time], <= 0, float32 or wider.

    Raises:
        TypeError: ``logits`` is not floating point or ``tokens`` is not int64.
        ValueError: ``tokens`` does not have the shape of ``logits`` without its last axis; devices differ.
    """
    check_floating(logits=logits)
    check_integer(tokens=tokens)
    check_same_shape("logits without its vocabulary axis", logits[..., 0], tokens=tokens)
    (logits,) = widen(logits)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def token_entropy(logits: Float[Tensor, "*batch time vocab"]) -> Float[Tensor, "*batch time"]:
    """-sum_v p_v log p_v with p = softmax(logits), in nats, between 0 and log(vocab).

    Computed as logsumexp(logits) - sum_v p_v logits_v. Tokens ruled out by -inf contribute 0. Differentiable, so
    that an entropy bonus has a gradient (TRL's fused path drops it).

    Raises:
        TypeError: ``logits`` is not floating point.
    """
    check_floating(logits=logits)
    (logits,) = widen(logits)
    possible = torch.where(torch.isneginf(logits), 0.0, logits)
    return logits.logsumexp(-1) - (logits.softmax(-1) * possible).sum(-1)
