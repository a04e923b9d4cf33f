"""Forward passes over a rollout: log-probabilities, entropies and values at the kept response tokens, and nowhere else.

A batch of prompts and responses becomes :class:`Rows`. Hidden states are computed for whole rows, end to end where the
model keeps them apart and that costs less than padding. Then the positions that predict a kept token are packed into
[N, H], and only for those N are the LM head and the value head evaluated: no tensor with a vocabulary axis ever covers
the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_core import kl as kl_estimators
from ppo_core.fused_head import HeadOutput, fused_logprobs
from ppo_runtime.accel.products import current_product
from ppo_runtime.common.transfers import on_cpu
from ppo_runtime.models.bottom import frozen_depth, recorded, replayed, shared_depth
from ppo_runtime.models.heads import LMHead, hidden_states, lm_head, logits_at, mask_positions, seq2seq_hidden_states
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.modes import dropout_off
from ppo_runtime.models.packing import (
    keeps_rows_apart,
    most_tokens_end_to_end,
    packed_hidden_states,
    packing_pays,
)

# Tokens in one forward pass without gradients: enough to keep the device busy, and on a CPU no more than that, since
# rows of similar length waste less.
SCORING_TOKENS = {"cpu": 1024}
SCORING_TOKENS_ELSEWHERE = 4096
# Vocabulary entries per tile of the fused head. On a CPU a tile shall stay in the cache. Elsewhere it is a dozen
# kernels to launch whatever its width, so few and wide ones, as far as their memory is small beside a model's (256 MiB
# for 4096 tokens). Figures for a CPU are measured, the others reckoned: no GPU was at hand.
HEAD_CHUNK = {"cpu": 2048}
HEAD_CHUNK_ELSEWHERE = 8192
# Bytes of logits that one pass keeps for its gradient, as long as they fit; beyond that they are computed again, which
# is one product of four. Again reckoned, not measured, for other devices than a CPU.
KEPT_LOGITS = {"cpu": 256 * 2**20}
KEPT_LOGITS_ELSEWHERE = 2**30
# Rows per tile where a whole distribution is needed (kl_penalty="full").
FULL_KL_ROWS = 64

# Entered for each forward pass of the reference; gives the model to use (the policy itself, with its adapter off).
Reference = Callable[[], AbstractContextManager[Any]]
KLEstimator = Callable[[Tensor, Tensor, Tensor], Tensor]
KL_ESTIMATORS: dict[str, KLEstimator] = {
    "kl": kl_estimators.k1,
    "abs": kl_estimators.kl_abs,
    "mse": kl_estimators.k2,
}


class Bottom(NamedTuple):
    """What the bottom layers of a trunk make of rows, for passes that go on from there."""

    depth: int
    """How many layers."""
    states: list[Tensor]
    """[length, H] of each row."""


class Rows(NamedTuple):
    """A batch laid out for forward passes; padded on the right, every mask made from lengths."""

    input_ids: Tensor
    """[B, L] prompt and response, or the encoder's input."""
    attention_mask: Tensor
    """[B, L], 1 on real tokens."""
    decoder_input_ids: Tensor | None
    """[B, T] for an encoder-decoder: the response shifted right behind the start token."""
    predictors: Tensor
    """[B, T] the position whose hidden state predicts response token t."""
    tokens: Tensor
    """[B, T] response tokens."""
    mask: Tensor
    """[B, T] boolean, True on response tokens that count."""
    lengths: Sequence[int]
    """Input tokens of each row; known here, so that nobody has to wait for the device to tell."""
    times: Sequence[int]
    """Response tokens of each row up to the last that counts; likewise."""
    static: bool = False
    """Whether every pass keeps the full width, for compiled graphs, instead of that of its longest row."""
    bottom: Bottom | None = None
    """Where every pass begins, if not with the tokens."""

    def select(self, index: Tensor) -> "Rows":
        """These rows only, cut to the longest among them unless ``static``; the index comes from the CPU."""
        places = index.tolist()
        lengths, times = [self.lengths[row] for row in places], [self.times[row] for row in places]
        length, time = self.input_ids.shape[1], self.mask.shape[1]
        if not self.static:
            length, time = max(lengths), max(*times, 1)
        index = index.to(self.mask.device)  # once, and not with every tensor
        return Rows(
            self.input_ids[index, :length],
            self.attention_mask[index, :length],
            None if self.decoder_input_ids is None else self.decoder_input_ids[index, :time],
            self.predictors[index, :time],
            self.tokens[index, :time],
            self.mask[index, :time],
            lengths,
            times,
            self.static,
            self.bottom and self.bottom._replace(states=[self.bottom.states[row] for row in places]),
        )

    def widths(self) -> Sequence[int]:
        """Input tokens that each row takes in a forward pass."""
        return [self.input_ids.shape[1]] * len(self.lengths) if self.static else self.lengths


class Evaluation(NamedTuple):
    """What a model says of the kept response tokens, each [B, T] and 0 elsewhere."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class Scored(NamedTuple):
    """A rollout seen without gradients, each [B, T]."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl: Tensor


def lay_out(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    *,
    pad_token_id: int,
    decoder_start_token_id: int | None,
    device: torch.device,
    input_width: int = 0,
    response_width: int = 0,
) -> Rows:
    """Pad a ragged batch on the right. ``decoder_start_token_id`` is given for an encoder-decoder only.

    ``input_width`` and ``response_width``, where above 0, are the least widths of ``input_ids`` and of the response
    axis, and make the rows static. No token is ever cut off: see that rows fit before they come here.
    """
    # Wherever the rows come from, they meet here, and go to the device together.
    queries, responses = on_cpu(queries), on_cpu(responses)
    kept = None if response_masks is None else on_cpu(response_masks)
    batch, time = len(queries), max(response_width, *(len(response) for response in responses))
    encoder_decoder = decoder_start_token_id is not None
    inputs = list(queries) if encoder_decoder else [torch.cat(pair) for pair in zip(queries, responses, strict=True)]
    input_ids = torch.full((batch, max(input_width, *map(len, inputs))), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    tokens = torch.full((batch, time), pad_token_id)
    mask = torch.zeros(batch, time, dtype=torch.bool)
    predictors = torch.zeros(batch, time, dtype=torch.long)
    for row, (query, response, ids) in enumerate(zip(queries, responses, inputs, strict=True)):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        tokens[row, : len(response)] = response
        mask[row, : len(response)] = True if kept is None else kept[row]
        first = 0 if encoder_decoder else len(query) - 1
        predictors[row, : len(response)] = torch.arange(first, first + len(response))
    decoder_input_ids = None
    if decoder_start_token_id is not None:
        start = torch.full((batch, 1), decoder_start_token_id)
        decoder_input_ids = torch.cat((start, tokens[:, :-1]), dim=1).to(device)
    return Rows(
        input_ids.to(device),
        attention_mask.to(device),
        decoder_input_ids,
        predictors.to(device),
        tokens.to(device),
        mask.to(device),
        lengths=[len(ids) for ids in inputs],
        times=torch.where(mask, torch.arange(1, time + 1), 0).amax(-1).tolist(),
        static=input_width > 0 or response_width > 0,
    )


def evaluate(model: Any, rows: Rows) -> Evaluation:
    """Log-probabilities, entropies and, where the model has a value head, values of the kept tokens."""
    return read_off(model, predicting_states(model, rows), rows)


def predicting_states(model: Any, rows: Rows) -> Tensor:
    """Last hidden states [N, H] that predict the N kept tokens, in row-major order."""
    if not _packs(model, rows):
        with _beginning(model, rows, lambda states: pad_sequence(states, batch_first=True)):
            return at_predictors(row_states(model, rows), rows)
    with _beginning(model, rows, lambda states: torch.cat(states)[None]):
        hidden = packed_hidden_states(model, rows.input_ids, rows.attention_mask)
    lengths = rows.attention_mask.sum(-1)
    starts = lengths.cumsum(0) - lengths
    return hidden[(starts[:, None] + rows.predictors)[rows.mask]]


def _beginning(model: Any, rows: Rows, in_layout: Callable[[list[Tensor]], Tensor]) -> AbstractContextManager[None]:
    """Passes inside begin where the rows do."""
    if rows.bottom is None:
        return nullcontext()
    return replayed(model, rows.bottom.depth, in_layout(rows.bottom.states))


def _packs(model: Any, rows: Rows) -> bool:
    """Whether a pass takes the rows end to end, without padding."""
    if rows.decoder_input_ids is not None or rows.static:
        return False
    width = transformers_model(model).get_input_embeddings().weight.shape[-1]
    return (
        packing_pays(rows.lengths, width)
        and sum(rows.lengths) <= most_tokens_end_to_end(model)
        and keeps_rows_apart(model)
    )


def row_states(model: Any, rows: Rows) -> Tensor:
    """Last hidden states of whole rows, [B, L, H], or [B, T, H] of a decoder of its own."""
    if rows.decoder_input_ids is None:
        positions = mask_positions(rows.attention_mask)
        return hidden_states(model, rows.input_ids, rows.attention_mask, positions)
    return seq2seq_hidden_states(model, rows.input_ids, rows.attention_mask, rows.decoder_input_ids)


def at_predictors(hidden: Tensor, rows: Rows) -> Tensor:
    """Of whole rows' hidden states those that predict a kept token."""
    batch = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1).expand_as(rows.mask)
    kept = rows.mask.nonzero(as_tuple=True)  # whose size the device has to tell, once
    return hidden[batch[kept], rows.predictors[kept]]


def head_output(head: LMHead, hidden: Tensor, tokens: Tensor) -> HeadOutput:
    """The fused head on a model's own head parameters, at temperature 1; logits kept for the gradient if they fit."""
    device = hidden.device.type
    kept = KEPT_LOGITS.get(device, KEPT_LOGITS_ELSEWHERE)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    return fused_logprobs(
        hidden,
        head.weight,
        tokens,
        head.bias,
        temperature=1.0,
        scale=head.scale,
        softcap=head.softcap,
        chunk_size=HEAD_CHUNK.get(device, HEAD_CHUNK_ELSEWHERE),
        product=current_product(),
        keep_logits=learns and tokens.numel() * head.weight.shape[0] * 4 <= kept,
    )


@torch.no_grad()
def score_rollout(policy: Any, reference: Reference, rows: Rows, *, kl_penalty: str) -> tuple[Scored, Bottom | None]:
    """Old log-probabilities and values of the policy, log-probabilities of the reference, and the KL estimate.

    Dropout is off and every module's mode restored. Rows of similar length share a pass, whatever their order.

    Returns:
        These, and where later passes of the policy over the same rows may begin, until other parameters train.
    """
    most_tokens = SCORING_TOKENS.get(rows.mask.device.type, SCORING_TOKENS_ELSEWHERE)
    out = Scored(*(torch.zeros(rows.mask.shape, device=rows.mask.device) for _ in Scored._fields))
    depth = 0 if rows.static else frozen_depth(policy)
    bottoms: dict[int, Tensor] = {}
    with dropout_off(policy):
        shared = shared_depth(policy, reference, depth)
        for index in length_buckets(rows.widths(), most_tokens):
            part = rows.select(index)
            states, below = _with_bottom(policy, part, depth)
            bottoms |= dict(zip(index.tolist(), below, strict=bool(depth)))
            index = index.to(rows.mask.device)
            mine, head = read_off(policy, states, part), lm_head(policy)
            with reference() as model:
                ref_states = predicting_states(model, part._replace(bottom=Bottom(depth, below) if shared else None))
                theirs = read_off(model, ref_states, part)
                if kl_penalty == "full":
                    kl = _unpack(_full_kl(head, states, lm_head(model), ref_states), part.mask)
                else:
                    kl = KL_ESTIMATORS[kl_penalty](mine.logprobs, theirs.logprobs, part.mask)
            assert mine.values is not None
            time = part.mask.shape[1]
            for target, source in zip(out, (mine.logprobs, theirs.logprobs, mine.values, kl), strict=True):
                target[index, :time] = source.to(target.dtype)
    return out, Bottom(depth, [bottoms[row] for row in range(len(bottoms))]) if depth else None


def _with_bottom(model: Any, rows: Rows, depth: int) -> tuple[Tensor, list[Tensor]]:
    """States that predict the kept tokens, and what the first ``depth`` layers make of each row; none for 0."""
    if not depth:
        return predicting_states(model, rows), []
    with recorded(model, depth) as seen:
        states = predicting_states(model, rows)
    lengths, found = list(rows.lengths), seen[-1]  # the model may have been tried before
    if len(found) == 1:
        return states, list(found[0, : sum(lengths)].split(lengths))
    return states, [row[:length] for row, length in zip(found, lengths, strict=True)]


def length_buckets(lengths: Sequence[int], most_tokens: int) -> Iterator[Tensor]:
    """Row indices in groups of similar length, each group at most ``most_tokens`` wide when padded (or one row)."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        # The first row of a group is its longest.
        size = max(1, most_tokens // max(lengths[order[start]], 1))
        yield torch.tensor(order[start : start + size])
        start += size


def read_off(model: Any, hidden: Tensor, rows: Rows) -> Evaluation:
    """Both heads on the hidden states [N, H] that predict the kept tokens."""
    output = head_output(lm_head(model), hidden, rows.tokens[rows.mask])
    values = _unpack(model.v_head(hidden).squeeze(-1).float(), rows.mask) if hasattr(model, "v_head") else None
    return Evaluation(_unpack(output.logprobs, rows.mask), _unpack(output.entropy, rows.mask), values)


def _full_kl(head: LMHead, hidden: Tensor, ref_head: LMHead, ref_hidden: Tensor) -> Tensor:
    """Exact KL per kept token [N], a few rows of the vocabulary at a time."""
    kl = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for rows in torch.arange(len(hidden), device=hidden.device).split(FULL_KL_ROWS):
        kl[rows] = kl_estimators.full(
            logits_at(head, hidden[rows]).log_softmax(-1),
            logits_at(ref_head, ref_hidden[rows]).log_softmax(-1),
            torch.ones(len(rows), dtype=torch.bool, device=hidden.device),
        )
    return kl


def _unpack(values: Tensor, mask: Tensor) -> Tensor:
    """[N] in row-major order of the mask back to [B, T], 0 elsewhere; differentiable."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
