"""Language-model head, log-softmax and entropy in one, without ever holding the logits of the whole vocabulary.

[rows, vocab] logits are by far the largest tensor of a training step (1024 x 49152 in float32: 192 MiB, several times
over in autograd), yet only two numbers per row are wanted from them. These are gathered here while the vocabulary
passes by in tiles of ``chunk_size`` entries, and the tiles are computed again when the gradient is due. Tiles of
vocabulary rather than of rows: the weight and its gradient are walked through once, and a tile stays in the cache for
all that is done to it.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ppo_core._checks import check_floating, check_integer, check_same_device, check_without_axis, widen


class HeadOutput(NamedTuple):
    """What a policy loss needs to know of the distribution, in nats, both [*rows]."""

    logprobs: Float[Tensor, "*rows"]
    entropy: Float[Tensor, "*rows"]


def fused_logprobs(
    hidden: Float[Tensor, "*rows width"],
    weight: Float[Tensor, "vocab width"],
    tokens: Int64[Tensor, "*rows"],
    bias: Float[Tensor, "vocab"] | None = None,
    *,
    temperature: float,
    scale: float,
    softcap: float | None,
    chunk_size: int,
) -> HeadOutput:
    """log p[token] and -sum_v p_v log p_v of p = softmax(logits / temperature), differentiable in both.

    z = scale * (hidden @ weight.T + bias);  logits = softcap * tanh(z / softcap), or z without a softcap.

    With g_l and g_e the incoming gradients, and everything else recomputed tile by tile, the gradient by
    logits_v / temperature is g_l (1[v = token] - p_v) - g_e p_v (log p_v + entropy). One matrix product forward and
    three backward (two while ``weight`` is frozen); a dense head needs one and two, and the memory for all logits.

    Args:
        hidden: last hidden states, one row per prediction. Packed rows pay best: padding costs as much as a token.
        weight: the head's weight, e.g. the tied embedding.
        tokens: the sampled ids in [0, vocab).
        bias: the head's bias. -inf rules a token out.
        temperature: > 0, that of the sampling.
        scale: multiplies the logits ahead of the softcap (Cohere's ``logit_scale``; 1 / Granite's ``logits_scaling``).
        softcap: bounds the logits to +-softcap (Gemma 2, section 2, "logit soft-capping").
        chunk_size: vocabulary entries per tile. About 2 * rows * chunk_size numbers are held at a time.

    Returns:
        Log-probabilities (<= 0) and entropies (in [0, log vocab]), in nats, float32 or wider also under autocast.

    Raises:
        TypeError: a tensor is not floating point, ``tokens`` is not int64.
        ValueError: shapes or devices differ; ``temperature``, ``softcap`` or ``chunk_size`` is not positive.
        NotImplementedError: a second derivative was asked for.

    Same idea as Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), with an entropy that has
    a gradient (TRL's fused path drops it) and without their skipping of small gradients. Under ``torch.func.vmap`` one
    batch entry is taken after the other.
    """
    check_floating(hidden=hidden, weight=weight)
    check_integer(tokens=tokens)
    check_without_axis("width", "hidden", hidden, tokens=tokens)
    check_same_device("hidden", hidden, weight=weight)
    if weight.ndim != 2 or weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (vocab, {hidden.shape[-1]}) like hidden")
    if bias is not None:
        check_floating(bias=bias)
        check_without_axis("width", "weight", weight, bias=bias)
    for name, value in {"temperature": temperature, "softcap": softcap, "chunk_size": chunk_size}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, expected a number above 0")
    dtype = widen(hidden[..., :0], weight[:0])[0].dtype
    # All scalars are folded into the small factor: logits / temperature = u, or cap * tanh(u) with a softcap.
    factor = scale / (temperature if softcap is None else softcap)
    cap = None if softcap is None else softcap / temperature
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype) * factor
    offset = None if bias is None else bias.to(dtype) * factor
    logprobs, entropy, _ = _apply(_Head, rows, weight, tokens.reshape(-1), offset, cap, chunk_size)
    return HeadOutput(logprobs.reshape(tokens.shape), entropy.reshape(tokens.shape))


# Below -10^4 nats a probability is 0 in every dtype; the bound keeps 0 * -inf out of p log p.
_RULED_OUT = -1e4


def _tile(rows: Tensor, weight: Tensor, offset: Tensor | None, start: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The part of the weight from ``start`` on, widened, and u of the vocabulary entries in it."""
    part = weight[start : start + chunk].to(rows.dtype)
    u = rows @ part.T
    return part, u if offset is None else u.add_(offset[start : start + chunk])


class _Head(torch.autograd.Function):
    """(log-probability, entropy, logsumexp) per row, by a running maximum over the tiles."""

    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor, tokens: Tensor, offset: Tensor | None, cap: float | None, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Per row, with u relative to the maximum so far: sum exp(u), sum u exp(u), and u of the sampled token.
        top = torch.full_like(rows[:, 0], torch.finfo(rows.dtype).min)
        total, first, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for start in range(0, weight.shape[0], chunk):
            part, u = _tile(rows, weight, offset, start, chunk)
            if cap is not None:
                u = u.tanh_().mul_(cap)
            inside, index = _locate(tokens, start, part.shape[0])
            chosen = torch.where(inside, u.gather(1, index).squeeze(1), chosen)
            higher = torch.maximum(top, u.amax(1))
            drop = (top - higher).clamp_min(_RULED_OUT)
            first, total = drop.exp() * (first + drop * total), drop.exp() * total
            u = u.sub_(higher[:, None]).clamp_min_(_RULED_OUT)
            weights = u.exp()
            total = total + weights.sum(1)
            first = first + u.mul_(weights).sum(1)
            top = higher
        logsumexp = top + total.log()
        return chosen - logsumexp, total.log() - first / total, logsumexp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        rows, weight, tokens, offset, ctx.cap, ctx.chunk = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(rows, weight, tokens, offset, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        by_rows, by_weight, by_offset = _apply(
            _HeadGradient, *ctx.saved_tensors, *grads[:2], ctx.cap, ctx.chunk, *wanted
        )
        return by_rows, by_weight, None, by_offset, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _one_after_the_other(_Head, info, in_dims, args)


class _HeadGradient(torch.autograd.Function):
    """The backward pass of :class:`_Head`, a function of its own so that it can be mapped over as well."""

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        tokens: Tensor,
        offset: Tensor | None,
        entropy: Tensor,
        logsumexp: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor,
        cap: float | None,
        chunk: int,
        rows_wanted: bool,
        weight_wanted: bool,
        offset_wanted: bool,
    ) -> tuple[Tensor | None, ...]:
        by_rows = torch.zeros_like(rows) if rows_wanted else None
        by_weight = torch.empty_like(weight) if weight_wanted else None
        by_offset = torch.empty_like(offset) if offset is not None and offset_wanted else None
        constant = grad_logprobs + grad_entropy * entropy
        for start in range(0, weight.shape[0], chunk):
            here = slice(start, start + chunk)
            part, u = _tile(rows, weight, offset, start, chunk)
            slope = None
            if cap is not None:
                u = u.tanh_()
                slope = cap - cap * u.square()
                u = u.mul_(cap)
            logp = u.sub_(logsumexp[:, None]).clamp_min_(_RULED_OUT)
            p = logp.exp()
            grad = logp.mul_(grad_entropy[:, None]).add_(constant[:, None]).mul_(p).neg_()
            inside, index = _locate(tokens, start, part.shape[0])
            grad = grad.scatter_add_(1, index, torch.where(inside, grad_logprobs, 0.0)[:, None])
            if slope is not None:
                grad = grad.mul_(slope)
            if by_rows is not None:
                by_rows = by_rows.addmm_(grad, part)
            if by_weight is not None:
                by_weight[here] = grad.T @ rows
            if by_offset is not None:
                by_offset[here] = grad.sum(0)
        return by_rows, by_weight, by_offset

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("fused_logprobs has no second derivative; use token_logprobs and token_entropy")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _one_after_the_other(_HeadGradient, info, in_dims, args)


def _locate(tokens: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which rows' tokens lie in the tile, and at which column [rows, 1] (any legal one for the others)."""
    column = tokens - start
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


def _apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Any, ...]:
    """Apply the function with autocast off, which would round the logits."""
    device = args[0].device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        return function.apply(*args)  # pyright: ignore  (torch leaves apply untyped)


def _one_after_the_other(
    function: type[torch.autograd.Function], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A vmap rule that takes entries one by one: side by side, they would need the memory that the tiles save."""
    entries: list[tuple[Tensor | None, ...]] = []
    for i in range(info.batch_size):
        here = (a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        entries.append(function.apply(*here))  # pyright: ignore  (as above)
    outputs = [
        None if column[0] is None else torch.stack([x for x in column if x is not None])
        for column in zip(*entries, strict=True)
    ]
    return tuple(outputs), tuple(None if output is None else 0 for output in outputs)
