"""Count, mean and centred sum of squares: statistics that merge exactly over minibatches and ranks.

Within one tensor two passes are made (mean first, then squared deviations): E[x^2] - E[x]^2 cancels in float32, and a
group of rewards {10000, 10001} then normalises to +-500 instead of +-0.707. Parts are merged with the update of
Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979), eq. 2.1.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_bundles
from ppo_core._select import select, select_kept
from ppo_core.masking import Axes


class Moments(NamedTuple):
    """A commutative monoid under :func:`merge`; the neutral element is ``Moments(0, 0, 0)``."""

    n: Float[Tensor, "*shape"]
    """How many entries."""
    mean: Float[Tensor, "*shape"]
    """Their mean, in the unit of x; 0 when there are none."""
    m2: Float[Tensor, "*shape"]
    """Sum of squared deviations from the mean, in the squared unit of x."""


def masked_moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: Axes = None) -> Moments:
    """Moments of the kept entries of ``x`` over ``dim`` (over everything when None).

    mean = sum(x) / n,  m2 = sum((x - mean)^2).

    Returns:
        Moments in float32 or wider, with the reduced axes removed; zeros where nothing is kept.

    Raises:
        TypeError, ValueError: as :func:`ppo_core.masking.keep`.
    """
    axes = tuple(range(x.ndim)) if dim is None else dim
    selected, kept = select_kept(x, mask)
    count = kept.sum(axes, keepdim=True)
    mean = selected.sum(axes, keepdim=True) / count.clamp(min=1)
    centred = select(kept, selected - mean)
    return Moments(count.squeeze(axes), mean.squeeze(axes), centred.square().sum(axes))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both parts together. Associative, commutative, exact for an empty side.

    Raises:
        TypeError, ValueError: the fields are not floating-point tensors of one shape on one device.
    """
    check_bundles(a=a, b=b)
    n = a.n + b.n
    share = b.n / torch.where(n == 0, 1.0, n)
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * share, a.m2 + b.m2 + delta.square() * a.n * share)


def variance(m: Moments, *, correction: int) -> Float[Tensor, "*shape"]:
    """m2 / (n - correction): 1 is Bessel's unbiased estimate, 0 the biased one.

    Defined as 0 where ``n <= correction``: one sample shows no spread (TRL: NaN or an error). Raises as
    :func:`merge`.
    """
    check_bundles(m=m)
    degrees = m.n - correction
    return torch.where(degrees > 0, m.m2 / torch.where(degrees > 0, degrees, 1.0), 0.0)
