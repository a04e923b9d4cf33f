"""TRL's ``models``, its submodules included."""

import sys

from ppo_runtime.compat.elsewhere import attributes_of
from ppo_runtime.models.references import create_reference_model
from ppo_runtime.models.value_head import ValueHead
from ppo_runtime.models.wrapper import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "ValueHead",
    "create_reference_model",
]

SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)

__getattr__ = attributes_of(__name__)
for _name in ("modeling_base", "modeling_value_head"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = sys.modules[__name__]
