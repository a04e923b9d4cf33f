"""Language-model head, log-softmax and entropy in one, with the logits of the whole vocabulary held once or never.

[rows, vocab] logits are by far the largest tensor of a training step (1024 x 49152 in float32: 192 MiB, several times
over in autograd), yet only two numbers per row are wanted from them. These are gathered here while the vocabulary
passes by in tiles of ``chunk_size`` entries. When the gradient is due the tiles are computed again, or read from where
they were kept. Tiles of vocabulary rather than of rows: the weight and its gradient are walked through once, and a tile
stays in the cache for all that is done to it.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ppo_core._checks import check_floating, check_integer, check_same_device, check_without_axis, widen


@runtime_checkable
class Product(Protocol):
    """The product of two matrices: ``torch.mm``, or a kernel that is faster on some machine."""

    def __call__(self, a: Tensor, b: Tensor, /, *, out: Tensor | None = None) -> Tensor:
        """a @ b, without gradient; written to ``out`` where that is given, and returned."""
        ...


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
    keep_logits: bool,
    product: Product,
) -> HeadOutput:
    """log p[token] and -sum_v p_v log p_v of p = softmax(logits / temperature), differentiable in both.

    z = scale * (hidden @ weight.T + bias);  logits = softcap * tanh(z / softcap), or z without a softcap.

    With g_l and g_e the incoming gradients, and everything else had again tile by tile, the gradient by
    logits_v / temperature is g_l (1[v = token] - p_v) - g_e p_v (log p_v + entropy). One matrix product forward, and
    backward one for each of ``hidden`` and ``weight`` that learns and one to have the logits again, unless they were
    kept. Kept or not, the products and their order are the same, and results differ by rounding at most.

    Args:
        hidden: last hidden states, one row per prediction. Packed rows pay best: padding costs as much as a token.
        weight: the head's weight, e.g. the tied embedding.
        tokens: the sampled ids in [0, vocab).
        bias: the head's bias. -inf rules a token out.
        temperature: > 0, that of the sampling.
        scale: multiplies the logits ahead of the softcap (Cohere's ``logit_scale``; 1 / Granite's ``logits_scaling``).
        softcap: bounds the logits to +-softcap (Gemma 2, section 2, "logit soft-capping").
        chunk_size: vocabulary entries per tile. About 2 * rows * chunk_size numbers are held at a time.
        keep_logits: hold the logits, rows * vocab numbers more in the dtype of the result, from the forward to the
            backward pass, which then makes no product for them (1 + 2 in all, like a dense head, instead of 1 + 3).
            Worth its memory only where a gradient follows.
        product: what multiplies matrices, ``torch.mm`` unless the machine has something faster.

    Returns:
        Log-probabilities (<= 0) and entropies (in [0, log vocab]), in nats, float32 or wider also under autocast.

    Raises:
        TypeError: a tensor is not floating point, ``tokens`` is not int64.
        ValueError: shapes or devices differ; ``temperature``, ``softcap`` or ``chunk_size`` is not positive.
        NotImplementedError: a second derivative was asked for.

    Same idea as Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), with an entropy that has
    a gradient (TRL's fused path drops it) and without their skipping of small gradients. Under ``torch.func.vmap`` one
    batch entry is taken after the other, and what is kept is kept for all.
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
    logprobs, entropy, *_ = _apply(
        _Head, rows, weight, tokens.reshape(-1), offset, cap, chunk_size, keep_logits, product
    )
    return HeadOutput(logprobs.reshape(tokens.shape), entropy.reshape(tokens.shape))


# Below -10^4 nats a probability is 0 in every dtype; the bound keeps 0 * -inf out of p log p.
_RULED_OUT = -1e4


def _logits(
    product: Product, rows: Tensor, part: Tensor, offset: Tensor | None, cap: float | None, out: Tensor | None
) -> Tensor:
    """logits / temperature of the vocabulary entries whose weight is ``part``, [rows, entries]."""
    u = product(rows, part.T, out=out)
    if offset is not None:
        u = u.add_(offset)
    return u if cap is None else u.tanh_().mul_(cap)


class _Head(torch.autograd.Function):
    """(log-probability, entropy, logsumexp) per row, by a running maximum over the tiles; and the logits, if kept."""

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        tokens: Tensor,
        offset: Tensor | None,
        cap: float | None,
        chunk: int,
        keep: bool,
        product: Product,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # Per row, with u relative to the maximum so far: sum exp(u), sum u exp(u), and u of the sampled token.
        top = torch.full_like(rows[:, 0], torch.finfo(rows.dtype).min)
        total, first, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        kept = rows.new_empty(weight.shape[0], rows.shape[0]) if keep else None
        for start in range(0, weight.shape[0], chunk):
            here = slice(start, start + chunk)
            part = weight[here].to(rows.dtype)
            u = _logits(product, rows, part, _part(offset, here), cap, _tile(kept, here))
            inside, index = _locate(tokens, start, part.shape[0])
            chosen = torch.where(inside, u.gather(1, index).squeeze(1), chosen)
            higher = torch.maximum(top, u.amax(1))
            drop = (top - higher).clamp_min(_RULED_OUT)
            first, total = drop.exp() * (first + drop * total), drop.exp() * total
            u = torch.sub(u, higher[:, None], out=None if keep else u).clamp_min_(_RULED_OUT)
            weights = u.exp()
            total = total + weights.sum(1)
            first = first + u.mul_(weights).sum(1)
            top = higher
        logsumexp = top + total.log()
        return chosen - logsumexp, total.log() - first / total, logsumexp, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        rows, weight, tokens, offset, ctx.cap, ctx.chunk, _, ctx.product = inputs
        # Zeros in the place of a gradient that nobody asked for would be as large as what is kept.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
        ctx.save_for_backward(rows, weight, tokens, offset, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        entropy = ctx.saved_tensors[4]
        incoming = (torch.zeros_like(entropy) if grads[0] is None else grads[0], grads[1])
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        by_rows, by_weight, by_offset = _apply(
            _HeadGradient, *ctx.saved_tensors, *incoming, ctx.cap, ctx.chunk, *wanted, ctx.product
        )
        return by_rows, by_weight, None, by_offset, None, None, None, None

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
        kept: Tensor | None,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        cap: float | None,
        chunk: int,
        rows_wanted: bool,
        weight_wanted: bool,
        offset_wanted: bool,
        product: Product,
    ) -> tuple[Tensor | None, ...]:
        by_rows = torch.zeros_like(rows) if rows_wanted else None
        by_weight = weight.new_empty(weight.shape) if weight_wanted else None
        by_offset = torch.empty_like(offset) if offset is not None and offset_wanted else None
        constant = grad_logprobs if grad_entropy is None else grad_logprobs + grad_entropy * entropy
        for start in range(0, weight.shape[0], chunk):
            here = slice(start, start + chunk)
            part = weight[here].to(rows.dtype)
            u = _tile(kept, here)
            if u is None:
                u = _logits(product, rows, part, _part(offset, here), cap, None)
            slope = None if cap is None else (u / cap).square_().mul_(-cap).add_(cap)
            # What is kept stays as it is: the graph may be retained, and another backward pass read it again.
            logp = torch.sub(u, logsumexp[:, None], out=None if kept is not None else u).clamp_min_(_RULED_OUT)
            if grad_entropy is None:  # as where the entropy is a statistic: half of the walks over the tile
                grad = logp.exp_().mul_(-constant[:, None])
            else:
                p = logp.exp()
                grad = logp.mul_(-grad_entropy[:, None]).sub_(constant[:, None]).mul_(p)
            inside, index = _locate(tokens, start, part.shape[0])
            grad = grad.scatter_add_(1, index, torch.where(inside, grad_logprobs, 0.0)[:, None])
            if slope is not None:
                grad = grad.mul_(slope)
            if by_rows is not None:
                by_rows = by_rows.add_(product(grad, part))
            if by_weight is not None and by_weight.dtype == grad.dtype:
                product(grad.T, rows, out=by_weight[here])
            elif by_weight is not None:
                by_weight[here] = product(grad.T, rows)
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
    """Which rows' tokens lie in the tile, and at which of its entries [rows, 1] (any one for the others)."""
    entry = tokens - start
    return (entry >= 0) & (entry < width), entry.clamp(0, width - 1)[:, None]


def _part(whole: Tensor | None, here: slice) -> Tensor | None:
    return None if whole is None else whole[here]


def _tile(kept: Tensor | None, here: slice) -> Tensor | None:
    """A tile [rows, entries] of what is kept, [vocab, rows] numbers in which one contiguous tile follows the other."""
    return None if kept is None else kept[here].view(kept[here].shape[::-1])


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
