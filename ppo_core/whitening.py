"""Shift and scale to mean 0 and variance 1, with statistics that are an argument."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_core._checks import check_broadcasts, check_bundles, check_same_device
from ppo_core.masking import keep
from ppo_core.moments import Moments, variance


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    moments: Moments,
    *,
    shift_mean: bool,
    correction: int,
    eps: float,
) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + eps), plus the mean again unless ``shift_mean``; masked entries are 0.

    The statistics come from outside (``masked_moments(x, mask)``, or those merged over all ranks), so whitening per
    minibatch, per batch and per world is one function and no collective hides in it.

    Args:
        x: values to whiten, e.g. advantages.
        mask: True where x counts.
        moments: of the population to whiten by; scalars, or anything that broadcasts against x.
        shift_mean: True centres on 0; False keeps the mean and only rescales around it (used for rewards, whose
            mean carries meaning).
        correction: 1 divides by n - 1 (TRL, verl, this project's trainer), 0 by n (OpenAI's original, OpenRLHF).
        eps: added to the variance inside the root, in the squared unit of x. Customary: 1e-8.

    Returns:
        Same shape, float32 or wider, dimensionless (unit of x if not ``shift_mean``). Constant input gives zeros.

    Raises:
        TypeError, ValueError: as :func:`ppo_core.masking.keep`; ``moments`` are not floating-point tensors of one
            shape that broadcasts to x, or are on another device.

    Source: the advantage normalisation of lm-human-preferences (Ziegler et al. 2019). torchtune's flag of the same
    name is inverted; trlx's statistics include padding.
    """
    kept = keep(x, mask)
    check_bundles(moments=moments)
    check_broadcasts("x", x, **{"moments.n": moments.n})
    check_same_device("x", x, **{"moments.n": moments.n})
    centred = kept - moments.mean
    spread = variance(moments, correction=correction) + eps
    # With eps = 0 a population without spread has nothing to scale by: 0, in value and gradient, instead of 0 * inf.
    scale = torch.where(spread > 0, torch.rsqrt(torch.where(spread > 0, spread, 1.0)), 0.0)
    whitened = centred * scale
    return keep(whitened if shift_mean else whitened + moments.mean, mask)
