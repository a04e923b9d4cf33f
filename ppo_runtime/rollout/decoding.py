"""Decodes token by token with a model's own forward pass: for decoder-only models and plain ways to choose a token.

Next to transformers' ``generate`` it leaves out what a rollout does not need: rows that are over leave the batch, equal
prompts are read once, and choosing a token takes few passes over the vocabulary. What it does not do is in
:mod:`ppo_runtime.rollout.obstacles`. Greedy decoding gives transformers' tokens; what is sampled comes from the same
distribution by other random numbers, which are the same however rows are batched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppo_runtime.models.heads import mask_positions, takes_positions
from ppo_runtime.models.inner import cache_argument, transformers_model
from ppo_runtime.rollout.drawing import Uniforms, draw
from ppo_runtime.rollout.ending import Ending
from ppo_runtime.rollout.plan import Plan, padded
from ppo_runtime.rollout.settings import Settings


def decode(
    model: Any,
    queries: Sequence[Tensor],
    settings: Settings,
    plan: Plan,
    new_tokens: Sequence[int | None],
    ours: dict[str, Any],
) -> list[Tensor]:
    """One response per query, as :func:`ppo_runtime.rollout.engine.generate_responses` has it."""
    inner = transformers_model(model)
    sampled = bool(settings["do_sample"])
    uniforms = Uniforms(len(queries)) if sampled else None
    places = range(len(queries)) if plan.places is None else plan.places
    warpers = _warpers(*sampling_settings(settings, ours)) if sampled else LogitsProcessorList()
    responses: list[Tensor] = []
    for most, start in zip(new_tokens, range(0, len(queries), plan.batch_size), strict=True):
        batch = slice(start, start + plan.batch_size)
        prompts = queries[batch]
        columns = None if uniforms is None else uniforms.columns(places[batch], prompts[0].device)
        most = settings["max_new_tokens"] if most is None else most
        limits = None if plan.most is None else torch.tensor(plan.most[batch], device=prompts[0].device)
        responses += _batch(inner, prompts, settings, plan, most, limits, warpers, columns)
    return responses


def _batch(
    inner: Any,
    prompts: Sequence[Tensor],
    settings: Settings,
    plan: Plan,
    most: int,
    limits: Tensor | None,
    warpers: Any,
    uniforms: Callable[[int], Tensor] | None,
) -> list[Tensor]:
    """The responses of one batch.

    Criteria see all of its rows at every step, as in transformers: those that are over go on with padding, and so do
    those that have come to a limit of their own.
    """
    ids, mask = padded(prompts, plan.pad_token_id, side="left")
    (rows, width), device = ids.shape, ids.device
    longest, fewest = int(most), int(settings["min_new_tokens"] or 0)
    tokens = torch.cat((ids, ids.new_full((rows, longest), plan.pad_token_id)), 1)
    mask = torch.cat((mask, mask.new_ones(rows, longest)), 1)
    lengths = mask[:, :width].sum(-1)
    ending = Ending(plan.eos_token_ids, plan.criteria, prompt_width=width)
    ends = torch.tensor(plan.eos_token_ids if fewest > 0 else [], dtype=torch.long, device=device)

    passing = Pass(inner)
    scores = passing.prompts(ids, mask[:, :width])
    live = torch.arange(rows, device=device)
    numbers = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(longest):
        if step < fewest:
            scores[:, ends] = -torch.inf
        if uniforms is None:
            chosen = scores.argmax(-1)
        else:
            chosen, good = draw(warpers(tokens, scores), uniforms(step)[live])
            numbers[live] &= good
        tokens[live, width + step] = chosen
        if plan.eos_token_ids or plan.criteria or limits is not None:
            over = ending(tokens[:, : width + step + 1], None)[live]
            over = over if limits is None else over | (limits[live] <= step + 1)
            stay = (~over).nonzero().squeeze(-1)  # waits for the device
            if not len(stay):
                break
            if len(stay) < len(live):
                live, chosen = live[stay], chosen[stay]
                passing.keep(stay)
        if step + 1 < longest:
            scores = passing.token(chosen, mask[live, : width + step + 1], lengths[live] + step)
    if not numbers.all():
        raise RuntimeError(
            "the model's logits hold NaN or infinity, or every token was forbidden: no token can be drawn from them; "
            "look at the model's weights"
        )
    return ending.cut(tokens[:, width:]) if ending.lengths is not None else list(tokens[:, width:])


class Pass:
    """A model's forward passes over one batch, with the cache between them; scores [B, V] of the next token."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.cache = DynamicCache(config=inner.config)
        self._constant: dict[str, Any] = {cache_argument(inner): self.cache, "use_cache": True, "logits_to_keep": 1}
        self._takes_positions = takes_positions(inner)

    def prompts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read prompts [B, L], equal ones once."""
        found: dict[tuple[int, ...], int] = {}
        # Padding and mask belong to what is compared: padding may be a token of another prompt.
        keys = [tuple(row) for row in torch.where(mask.bool(), ids, -1).tolist()]
        which = [found.setdefault(key, len(found)) for key in keys]
        first = torch.tensor([which.index(number) for number in range(len(found))], device=ids.device)
        scores = self._scores(ids[first], mask[first], mask_positions(mask[first]))
        if len(first) < len(ids):
            again = torch.tensor(which, device=ids.device)
            self.keep(again)
            scores = scores[again]
        return scores

    def token(self, chosen: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Read one more token [B] of each row."""
        return self._scores(chosen.unsqueeze(-1), mask, positions.unsqueeze(-1))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the cache."""
        self.cache.batch_select_indices(rows)

    def _scores(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        more = {"position_ids": positions} if self._takes_positions else {}
        output = self.inner(input_ids=ids, attention_mask=mask, **more, **self._constant)
        return output.logits[:, -1].float()


def sampling_settings(settings: Settings, ours: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Temperature, top_k and top_p in force."""
    temperature, top_k, top_p = (ours.get(name, settings[name]) for name in ("temperature", "top_k", "top_p"))
    return temperature, top_k, top_p


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """What these do to scores, in transformers' order."""
    found = LogitsProcessorList()
    if temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1.0:
        found.append(TopPLogitsWarper(float(top_p)))
    return found
