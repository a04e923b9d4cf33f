"""The transformers model inside a value-head wrapper and inside PEFT."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from ppo_runtime.common.extras import require


def import_peft() -> ModuleType:
    """The peft package, imported only when an adapter asks for it."""
    return require("peft", extra="peft", wanted_by="a PEFT adapter")


def is_peft_model(model: Any) -> bool:
    """Whether a model (not its wrapper) is a PeftModel, without importing peft: no import, no such model."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def pretrained_model(model: Any) -> Any:
    """What a value-head wrapper wraps (a PeftModel included), or the model itself."""
    return getattr(model, "pretrained_model", model)


def transformers_model(model: Any) -> Any:
    """The transformers model inside a wrapper and inside PEFT, with any adapter layers in it."""
    model = pretrained_model(model)
    return model.get_base_model() if is_peft_model(model) else model


def is_compiled(model: Any) -> bool:
    """Whether a model is what torch.compile returned, which is no transformers model any more."""
    return type(model).__name__ == "OptimizedModule"


def is_merged(model: Any) -> bool:
    """Whether an adapter of the model is merged into the weights that it was trained beside."""
    return any(getattr(part, "merged", False) is True for part in model.modules())


def has_encoder(model: Any) -> bool:
    """Whether a wrapper's or a PEFT model's transformers model, or that itself, is an encoder-decoder."""
    return bool(transformers_model(model).config.is_encoder_decoder)


def cache_argument(model: Any) -> str:
    """What the model's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(transformers_model(model).forward).parameters else "past_key_values"
