"""A PPO trainer for language models around the pure functions of :mod:`ppo_core`.

Names are imported when they are first used: transformers takes seconds to import, which ``--help`` need not wait for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from ppo_runtime.compat.trainer import PPOTrainer
    from ppo_runtime.config import PPOConfig
    from ppo_runtime.learning.controllers import AdaptiveKLController, FixedKLController
    from ppo_runtime.models.references import create_reference_model
    from ppo_runtime.models.wrapper import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
    )
    from ppo_runtime.ranks.seeding import set_seed
    from ppo_runtime.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveKLController": "learning.controllers",
    "AutoModelForCausalLMWithValueHead": "models.wrapper",
    "AutoModelForSeq2SeqLMWithValueHead": "models.wrapper",
    "FixedKLController": "learning.controllers",
    "PPOConfig": "config",
    "PPOTrainer": "compat.trainer",
    "PreTrainedModelWrapper": "models.wrapper",
    "Trainer": "trainer",
    "create_reference_model": "models.references",
    "set_seed": "ranks.seeding",
}

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "Trainer",
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        # A module of TRL's, a name that has stayed there, or nothing.
        if name.startswith("_") or not name.isidentifier() or find_spec(f"{__name__}.{name}") is not None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.compat"), name)
    # What is not at home elsewhere is one of TRL's array helpers.
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'compat')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
