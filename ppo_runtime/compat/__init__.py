"""Room for what users of the reference import beside the trainer: array helpers, samplers, piecewise methods.

Thin layers with the customary names and signatures; the arithmetic is ppo_core's. New code is better off with ppo_core
itself. What changed for users of the reference is in this directory's README.md.
"""

from ppo_runtime.compat.arrays import (
    clip_by_value,
    convert_to_scalar,
    entropy_from_logits,
    flatten_dict,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
    stack_dicts,
    stats_to_np,
    whiten,
)
from ppo_runtime.compat.sampling import LengthSampler, respond_to_batch
from ppo_runtime.compat.stats import get_global_statistics

__all__ = [
    "LengthSampler",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "get_global_statistics",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "respond_to_batch",
    "stack_dicts",
    "stats_to_np",
    "whiten",
]
