"""The reference's ``core``: array helpers, samplers and the seed."""

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
from ppo_runtime.compat.elsewhere import attributes_of
from ppo_runtime.compat.sampling import LengthSampler, respond_to_batch
from ppo_runtime.seeding import set_seed

__all__ = [
    "LengthSampler",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "whiten",
]

__getattr__ = attributes_of(__name__)
