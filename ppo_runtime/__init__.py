"""A PPO trainer for language models around the pure functions of :mod:`ppo_core`."""

from ppo_runtime.compat import (
    LengthSampler,
    clip_by_value,
    convert_to_scalar,
    entropy_from_logits,
    flatten_dict,
    get_global_statistics,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
    respond_to_batch,
    stack_dicts,
    stats_to_np,
    whiten,
)
from ppo_runtime.config import PPOConfig
from ppo_runtime.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)
from ppo_runtime.references import create_reference_model
from ppo_runtime.seeding import set_seed
from ppo_runtime.trainer import PPOTrainer

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "clip_by_value",
    "convert_to_scalar",
    "create_reference_model",
    "entropy_from_logits",
    "flatten_dict",
    "get_global_statistics",
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
