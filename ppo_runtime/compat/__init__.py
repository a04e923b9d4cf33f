"""What users of TRL import: the trainer by its names, piecewise methods, array helpers, samplers.

Thin layers with the customary names and signatures; the arithmetic is ppo_core's. New code is better off with ppo_core
itself. What changed for users of TRL is in this directory's README.md.

The package can stand for TRL: ``import ppo_runtime.compat as trl``. What it does not hold says where it is.

trainer       PPOTrainer, settings, controllers
piecewise     the methods that step is made of, one by one
doors         checks of the piecewise methods' arguments
layout        model_inputs, and where the responses lie in it
stats         flat dictionaries of tensors, gathered over ranks
recording     statistics of a step from its pieces
arrays        masked_mean, whiten, logprobs_from_logits, ...
sampling      LengthSampler, respond_to_batch
accelerator   trainer.accelerator and its like, without accelerate
elsewhere     where the names are that are not here
core          TRL's modules, by its names
models        wrappers
import_utils  what is installed
extras        empty; says where TRL's names are
environment   likewise
"""

from importlib import import_module
from typing import Any

import ppo_runtime
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
from ppo_runtime.compat.elsewhere import refuse
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

_MODULES = ("core", "environment", "extras", "import_utils", "models", "trainer")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in ppo_runtime._HOMES:
        return getattr(ppo_runtime, name)
    if name.startswith("is_") and name.endswith("_available"):
        return getattr(import_module(f"{__name__}.import_utils"), name)
    if name == "SUPPORTED_ARCHITECTURES":
        return import_module(f"{__name__}.models").SUPPORTED_ARCHITECTURES
    refuse(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
