"""Masks, one meaning everywhere: True = a position that counts, False = a position that is not there.

A masked position is deleted, not zero-filled: whatever it holds (zeros, garbage, inf, NaN) can change neither a
value nor a gradient. Every selection comes ahead of the arithmetic, since a product lets NaN through.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_axis, check_boolean
from ppo_core._select import select_kept

Axes = int | tuple[int, ...] | None


def keep(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``x`` where ``mask`` holds, 0 elsewhere, in value and in gradient.

    Args:
        x: any floating-point tensor.
        mask: same shape; True keeps.

    Returns:
        Same shape, float32 or wider. Masked entries are exactly 0 and receive exactly zero gradient.

    Raises:
        TypeError: ``x`` is not floating point or ``mask`` is not boolean.
        ValueError: shapes or devices differ.
    """
    return select_kept(x, mask)[0]


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: Axes = None) -> Float[Tensor, "*rest"]:
    """Sum of the kept entries over ``dim`` (all axes when None); 0 where nothing is kept.

    Units are those of ``x``. Raises as :func:`keep`.
    """
    return keep(x, mask).sum(dim)


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: Axes = None
) -> Float[Tensor, "*rest"]:
    """Mean of the kept entries over ``dim`` (all axes when None); 0 where nothing is kept.

    Units are those of ``x``. Raises as :func:`keep`. TRL's and verl's functions of this name add 1e-8 to the
    denominator or return NaN for an empty mask; here an empty selection has mean 0 by definition.
    """
    total = masked_sum(x, mask, dim=dim)
    return total / mask.sum(dim).clamp(min=1)


def last_kept(mask: Bool[Tensor, "*batch time"]) -> Bool[Tensor, "*batch time"]:
    """True on the last kept position of every sequence and nowhere else (nowhere at all for an empty one).

    Raises:
        TypeError: ``mask`` is not boolean.
        ValueError: ``mask`` has no time axis.
    """
    check_boolean(mask=mask)
    check_axis("time", mask=mask)
    if not mask.shape[-1]:
        return mask
    place = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return mask & (place == (place * mask).amax(-1, keepdim=True))
