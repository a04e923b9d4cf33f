"""TRL's array helpers on top of ppo_core. Masks may be boolean or hold 0 and 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_core import masking, whitening
from ppo_core.logprobs import token_entropy, token_logprobs
from ppo_core.moments import masked_moments, variance
from ppo_runtime.learning.advantages import WHITENING_EPS


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """log softmax(logits)[labels], or all of log softmax(logits) with ``gather=False``; float32 or wider."""
    if gather:
        if labels is None:
            raise ValueError("labels is None, expected token ids; pass gather=False for the whole distribution")
        return token_logprobs(logits, labels.long())
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats, without the vocabulary axis."""
    return token_entropy(logits)


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of the kept entries; 0 where none is kept. TRL divides by 0 or adds 1e-8 there."""
    return masking.masked_mean(_floating(values), mask.bool(), dim=axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the kept entries; 0 where there are too few to have one. TRL raises there."""
    return variance(masked_moments(_floating(values), mask.bool()), correction=int(unbiased))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Kept entries with mean 0 (theirs if not ``shift_mean``) and variance 1; masked ones are 0."""
    values, mask = _floating(values), mask.bool()
    return whitening.whiten(
        values, mask, masked_moments(values, mask), shift_mean=shift_mean, correction=1, eps=WHITENING_EPS
    )


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """``masked_whiten`` with everything kept."""
    return masked_whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean)


def clip_by_value(x: Tensor, tensor_min: float | Tensor, tensor_max: float | Tensor) -> Tensor:
    """Entries within [tensor_min, tensor_max], which may be tensors; the lower bound wins if they cross."""
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (tensor_min, tensor_max))
    return torch.maximum(torch.minimum(x, high), low)


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a/b": 1}.

    Raises:
        ValueError: two entries end up under one key.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        entries = flatten_dict(value, sep) if isinstance(value, Mapping) else {"": value}
        for tail, leaf in entries.items():
            name = f"{key}{sep}{tail}" if tail else str(key)
            if name in flat:
                raise ValueError(f"nested has two entries for {name!r}, expected one; rename one of them")
            flat[name] = leaf
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One tensor [dictionaries, entries] per key; what is shorter is filled with NaN.

    TRL fills with -1, which a mean then takes for data; use ``nanmean``.

    Raises:
        ValueError: the dictionaries have different keys, or there is none.
    """
    if not stats_dicts:
        raise ValueError("stats_dicts is empty, expected at least one dictionary")
    for index, stats in enumerate(stats_dicts):
        if stats.keys() != stats_dicts[0].keys():
            raise ValueError(
                f"stats_dicts[{index}] differs from the first in {sorted(stats.keys() ^ stats_dicts[0].keys())}, "
                "expected the same keys in all"
            )

    def stacked(key: str) -> Tensor:
        rows = [_floating(torch.as_tensor(stats[key])).flatten() for stats in stats_dicts]
        return pad_sequence(rows, batch_first=True, padding_value=float("nan"))

    return {key: stacked(key) for key in stats_dicts[0]}


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as numpy arrays (half precision and below as float32), single real numbers as floats, the rest as is."""
    converted: dict[str, Any] = {}
    for key, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().resolve_conj().resolve_neg()
            value = (value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value).numpy()
        converted[key] = float(value) if _is_real(value) else value
    return converted


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are single real numbers, as floats; the others are left out."""
    scalars: dict[str, float] = {}
    for key, value in stats.items():
        if isinstance(value, Tensor | np.ndarray) and value.shape in ((), (1,)):
            value = value.item()
        if _is_real(value):
            scalars[key] = float(value)
    return scalars


def _is_real(value: Any) -> bool:
    """Whether a value is one real number, of Python or numpy: no complex one, whose half would go, and no text."""
    if isinstance(value, np.ndarray | np.generic):
        return value.shape == () and value.dtype.kind in "biuf"
    return isinstance(value, int | float)


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.float()
