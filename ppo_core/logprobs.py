"""Log-probabilities and entropies from logits."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ppo_core._checks import check_axis, check_floating, check_integer, check_without_axis, widen


def token_logprobs(logits: Float[Tensor, "*batch vocab"], tokens: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log softmax(logits)[token], in nats, without building the whole log-softmax.

    logits_token - logsumexp(logits)

    Args:
        logits: unnormalised scores; ``logits[..., t, :]`` predicts ``tokens[..., t]``, with any axes in front, as a
            rule batch and time. -inf rules a token out.
        tokens: token ids in [0, vocab).

    Returns:
        The shape of ``tokens``, <= 0, float32 or wider.

    Raises:
        TypeError: ``logits`` is not floating point or ``tokens`` is not int64.
        ValueError: ``logits`` has no axes; ``tokens`` does not have its shape without the last axis; devices differ.
    """
    check_floating(logits=logits)
    check_integer(tokens=tokens)
    check_without_axis("vocab", "logits", logits, tokens=tokens)
    (logits,) = widen(logits)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def token_entropy(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """-sum_v p_v log p_v with p = softmax(logits), in nats, between 0 and log(vocab).

    Computed as logsumexp(logits) - sum_v p_v logits_v. Tokens ruled out by -inf contribute 0. Differentiable, so
    that an entropy bonus has a gradient (TRL's fused path drops it).

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: ``logits`` has no axes.
    """
    check_floating(logits=logits)
    check_axis("vocab", logits=logits)
    (logits,) = widen(logits)
    possible = torch.where(torch.isneginf(logits), 0.0, logits)
    return logits.logsumexp(-1) - (logits.softmax(-1) * possible).sum(-1)


def restrict_to_support(
    logits: Float[Tensor, "*batch vocab"], *, temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "*batch vocab"]:
    """The logits of the distribution that was sampled from: logits / temperature, and -inf outside its support.

    Temperature first, then the ``top_k`` most likely tokens, then the smallest set of the most likely among *those*
    whose probability reaches ``top_p`` (nucleus sampling: Holtzman et al., "The Curious Case of Neural Text
    Degeneration", 2019, section 3.1). Feed the result to :func:`token_logprobs` and :func:`token_entropy`: only these
    are the behaviour's log-probabilities, and a ratio against plain ones is not 1 before the first update. The support
    is a choice without gradient; within it the gradient is that of logits / temperature.

    Args:
        logits: unnormalised scores, -inf where a token is ruled out already.
        temperature: > 0, dimensionless.
        top_k: how many tokens to keep, None or 0 for all. Tokens tied with the k-th are all kept.
        top_p: probability to keep, in [0, 1], None or 1 for all. The most likely token is always kept; of tied tokens
            those are kept that ``torch.sort`` puts last.

    Returns:
        Same shape, float32 or wider, unnormalised.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: ``logits`` has no axes; ``temperature``, ``top_k`` or ``top_p`` is out of range.

    Order and ties are those of transformers' ``generate`` (its warpers for temperature, top-k and top-p). A later
    policy can give a sampled token a probability of 0 here (log-probability -inf), once it falls out of the support.
    """
    check_floating(logits=logits)
    check_axis("vocab", logits=logits)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0; greedy decoding has no density")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected a number of tokens, or 0 or None for all")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a probability in [0, 1], or None for all")
    (logits,) = widen(logits)
    logits = logits / temperature
    if top_k is not None and 0 < top_k < logits.shape[-1]:
        least = logits.detach().topk(top_k, dim=-1).values[..., -1:]
        logits = torch.where(logits.detach() < least, -torch.inf, logits)
    if top_p is not None and top_p < 1:
        ascending, order = logits.detach().sort(dim=-1)
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely = torch.cat((unlikely[..., :-1], torch.zeros_like(unlikely[..., -1:])), dim=-1)
        logits = torch.where(torch.zeros_like(unlikely).scatter(-1, order, unlikely), -torch.inf, logits)
    return logits
