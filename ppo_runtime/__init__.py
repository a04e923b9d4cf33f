"""A PPO trainer for language models around the pure functions of :mod:`ppo_core`."""

from ppo_runtime.config import PPOConfig
from ppo_runtime.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)
from ppo_runtime.references import create_reference_model
from ppo_runtime.trainer import PPOTrainer, set_seed

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "create_reference_model",
    "set_seed",
]
