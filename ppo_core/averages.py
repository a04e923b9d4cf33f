"""Averages as pairs (total, weight) that are merged exactly and divided once, at the end.

A mean of means is wrong as soon as the parts differ in size. Losses and metrics therefore travel as the pair and are
divided once, at the end: gradient accumulation, ragged last batches and ranks become one code path, and no result
depends on how a batch was split.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_bundles
from ppo_core.masking import masked_sum


class Average(NamedTuple):
    """A weighted total and its weight. The neutral element is ``Average(0, 0)``."""

    total: Float[Tensor, "*shape"]
    """Sum over the kept entries, in the unit of the quantity times the unit of the weight."""
    weight: Float[Tensor, "*shape"]
    """How much was summed: a number of tokens, of sequences, ..."""


def average(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Average:
    """The (total, weight) of the kept entries of ``x``; the weight counts them.

    Raises as :func:`ppo_core.masking.keep`.
    """
    total = masked_sum(x, mask)
    return Average(total, mask.sum().to(total.dtype))


def merge(a: Average, b: Average) -> Average:
    """The average over both parts. Associative and commutative; ``Average(0, 0)`` changes nothing.

    Raises:
        TypeError, ValueError: the fields are not floating-point tensors of one shape on one device.
    """
    check_bundles(a=a, b=b)
    return Average(a.total + b.total, a.weight + b.weight)


def mean_of(a: Average) -> Float[Tensor, "*shape"]:
    """total / weight, and 0 where the weight is 0: nothing was there to average. Raises as :func:`merge`."""
    check_bundles(a=a)
    empty = a.weight == 0
    return torch.where(empty, 0.0, a.total / torch.where(empty, 1.0, a.weight))
