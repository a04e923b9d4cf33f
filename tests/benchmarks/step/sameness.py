"""Whether both sides compute the same numbers, where the order of the rows is the same.

Settings in which both are defined the same: float32 and eager torch; one step of W1 (no accumulation, so that both
divide by the tokens of a minibatch); the same value head, which both would draw from distributions of their own; no
dropout (ours switches it off for a step, the peer computes in evaluation mode); nothing masked inside a response,
where the peer fills with zeros and we delete; plain KL, whitened advantages, no scaling, no clipping of the norm, no
early stop, no update left out for its ratio. The policy is moved away from its reference first, so that there is a KL
to compare. Statistics of updates are compared per token: the peer's means of means are averaged anew from its
minibatches.

Two optimisers: SGD, whose step is linear in the gradient, says how well the gradients agree; Adam is what is trained
with, and divides by gradients, also by those that are no larger than their rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, dict[str, Tensor]]


class Distance(NamedTuple):
    """How far two sides' weights are apart after one step, and how far that step has led."""

    apart: float
    """The greatest difference of two weights."""
    moved: float
    """The greatest change of a weight by the step."""
    relative: float
    """Norm of all differences / norm of all changes."""
    where: str
    """The parameter of the greatest difference."""
    rounding: float
    """The greatest difference in a parameter / its greatest weight, over all parameters; float32 rounds at 6e-8."""


def distance(ours: Weights, peer: Weights) -> Distance:
    """Compare the weights "after", which must come from the same "before".

    Raises:
        ValueError: parameters of other names, or other weights to begin with.
    """
    if ours["before"].keys() != peer["before"].keys():
        raise ValueError(f"only one side has {sorted(ours['before'].keys() ^ peer['before'].keys())[:4]}")
    for name, weight in ours["before"].items():
        if not torch.equal(weight, peer["before"][name]):
            raise ValueError(f"{name} is not the same to begin with")
    apart: dict[str, float] = {}
    moved: dict[str, float] = {}
    rounding: dict[str, float] = {}
    squares = torch.zeros(2, dtype=torch.float64)
    for name, before in ours["before"].items():
        difference, change = ours["after"][name] - peer["after"][name], ours["after"][name] - before
        apart[name], moved[name] = float(difference.abs().max()), float(change.abs().max())
        rounding[name] = apart[name] / float(ours["after"][name].abs().max().clamp_min(torch.finfo(before.dtype).tiny))
        squares += torch.stack([x.double().square().sum() for x in (difference, change)])
    where = max(apart, key=lambda name: apart[name])
    relative = float((squares[0] / squares[1]).sqrt())
    return Distance(apart[where], max(moved.values()), relative, where, max(rounding.values()))


def render(optimiser: str, ours: dict[str, Any], peer: dict[str, Any], weights: Distance) -> str:
    """Both sides' statistics and the distance of their weights."""
    lines = [f"{optimiser}: one step of W1 in the same order of rows"]
    for name, mine in ours["statistics"].items():
        theirs = peer["statistics"][name]
        lines.append(f"  {name:22} ours {mine:+.8f}  peer {theirs:+.8f}  apart {abs(mine - theirs):.1e}")
    lines.append(
        f"  weights: {weights.apart:.1e} apart at most, in {weights.where}; the step moved by {weights.moved:.1e}"
    )
    lines.append(
        f"  of the greatest weight of the same parameter, {weights.rounding:.1e} at most; float32 rounds at 6e-8"
    )
    lines.append(f"  norm of all differences / norm of all changes: {weights.relative:.1e}")
    return "\n".join(lines)
