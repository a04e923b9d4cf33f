"""Draws tokens from scores over a vocabulary, by uniform numbers that do not depend on how rows are batched."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ppo_runtime.ranks.seeding import mixed

# Scores of one block are added up in one go; a draw looks into one block only.
_BLOCK = 128
# Steps of a rollout whose uniform numbers are drawn at a time.
_STEPS = 64


class Uniforms:
    """Uniform numbers in [0, 1) for every row and step of a call, from one number of torch's global generator.

    The number of a row at a step depends on the row's place among the caller's queries alone: not on how many these
    are, nor on the rows it is generated with, nor on where they end, nor on the device.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._seed = int(torch.randint(2**63 - 1, (), dtype=torch.long))

    def columns(self, places: Sequence[int], device: torch.device) -> "Columns":
        """The numbers of some rows, on a device."""
        return Columns(self, torch.tensor(places, dtype=torch.long), device)

    def block(self, number: int) -> Tensor:
        """The numbers [_STEPS, rows] of so many steps."""
        generator = torch.Generator().manual_seed(mixed(self._seed, number))
        # Row by row, so that more rows come after those that are there without them.
        return torch.rand(self._rows, _STEPS, dtype=torch.float64, generator=generator).T


class Columns:
    """The uniform numbers of the rows of one batch."""

    def __init__(self, uniforms: Uniforms, places: Tensor, device: torch.device) -> None:
        self._uniforms, self._places, self._device = uniforms, places, device
        self._block = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Numbers [rows] of a step; steps come one after another from 0."""
        number, within = divmod(step, _STEPS)
        if not within:
            self._block = self._uniforms.block(number)[:, self._places].to(self._device)
        return self._block[within]


def draw(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] from the softmax of scores [B, V] by inversion, and whether each row's scores were numbers.

    Exponentials are added up block by block in double precision, and only the block that a draw falls into is looked
    at token by token: neither is the softmax divided by its sum, nor a random number drawn for every token. A token
    whose score is minus infinity is never drawn.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    if rest := -weights.shape[-1] % _BLOCK:
        weights = F.pad(weights, (0, rest))
    weights = weights.unflatten(-1, (-1, _BLOCK))
    upto = weights.sum(-1).double().cumsum(-1)
    target = uniforms.unsqueeze(-1) * upto[:, -1:]
    block = _first_above(upto, target)
    before = F.pad(upto, (1, 0)).gather(-1, block)
    rows = torch.arange(len(scores), device=scores.device).unsqueeze(-1)
    within = _first_above(weights[rows, block].squeeze(1).double().cumsum(-1), target - before)
    return (block * _BLOCK + within).squeeze(-1), upto[:, -1].isfinite()


def _first_above(upto: Tensor, target: Tensor) -> Tensor:
    """The first place [B, 1] where running sums [B, N] exceed the target; rounding may take it to the last sum."""
    last = upto[:, -1:]
    target = torch.minimum(target.clamp(min=0), torch.nextafter(last, torch.zeros_like(last)))
    return (upto <= target).sum(-1, keepdim=True).clamp(max=upto.shape[-1] - 1)
