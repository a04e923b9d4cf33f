"""What about a model or a call is left to transformers' ``generate``, by settings, by class and by trying."""

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ppo_runtime.models.heads import mask_positions
from ppo_runtime.models.inner import has_encoder, is_peft_model, pretrained_model, transformers_model
from ppo_runtime.models.wrapper import PreTrainedModelWrapper
from ppo_runtime.rollout.decoding import Pass, sampling_settings
from ppo_runtime.rollout.plan import Plan
from ppo_runtime.rollout.sampling import NEUTRAL, departures
from ppo_runtime.rollout.settings import Settings, fields
from ppo_runtime.rollout.values import REFUSED

# Settings that are heeded here, and those that mean nothing to one token at a time from one beam.
_HEEDED = {
    *("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "min_new_tokens", "min_length"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "stopping_criteria", "tokenizer"),
    *("transformers_version", "trust_remote_code", "length_penalty", "early_stopping", "low_memory", "disable_compile"),
}
_KINDS_OF_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# Models that decoded a few made-up rows as their plain forward pass does, and those that did not.
_proved: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def obstacle(
    model: Any, settings: Settings, plan: Plan, new_tokens: Sequence[int | None], ours: dict[str, Any]
) -> str | None:
    """What about a model or a call is left to transformers' ``generate``; None if nothing."""
    if asked := next(_unheeded(settings), None):
        return f"{asked} is transformers' to heed"
    if settings["do_sample"] and None in sampling_settings(settings, ours):
        return "transformers has defaults of its own for what nobody sets"
    if plan.prompt_width:
        return "prompts have a fixed width"
    if None in new_tokens and settings["max_new_tokens"] is None:
        return "no length is given"
    outer, inner = pretrained_model(model), transformers_model(model)
    name = type(inner).__name__
    own = isinstance(model, PreTrainedModelWrapper) and type(model).generate is not PreTrainedModelWrapper.generate
    if own or any("generate" in vars(part) for part in (model, outer, inner)) or _overrides(type(inner)):
        return f"{name} has a way of its own to generate"
    if has_encoder(model):
        return f"{name} is an encoder-decoder"
    if is_peft_model(outer) and outer.active_peft_config.is_prompt_learning:
        return "the adapter puts tokens in front of the prompt"
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return f"{name} computes logits at every position"
    if inner not in _proved and (verdict := _decodes(inner)) is not None:
        _proved[inner] = verdict
    return None if _proved.get(inner) else f"{name} has a cache that rows can't be taken out of"


def _unheeded(settings: Settings) -> Any:
    """Names of settings and arguments in force that are not heeded here."""
    moved = departures(settings)
    for name in sorted((fields() | settings.keywords.keys()) - _HEEDED - REFUSED.keys()):
        value = settings[name]
        if name == "use_cache":
            if value is False:
                yield name
        elif name in NEUTRAL:
            if name in moved:
                yield name
        elif not (value is None or value is False or (isinstance(value, list) and not value)):
            yield name


def _overrides(kind: type) -> bool:
    """Whether a model's class replaces a method of transformers' ``generate``."""
    methods = {name: value for name, value in vars(GenerationMixin).items() if isinstance(value, FunctionType)}
    return any(getattr(kind, name, None) is not value for name, value in methods.items())


@torch.no_grad()
def _decodes(inner: Any) -> bool | None:
    """Whether decoding rows that were put in another order gives what a plain forward pass gives.

    None where that can't be told, because weights are no numbers.
    """
    layers = DynamicCache(config=inner.config).layers
    if any(type(layer) not in _KINDS_OF_LAYERS for layer in layers):
        return False
    device = inner.get_input_embeddings().weight.device
    ids = torch.arange(12, device=device).reshape(2, 6) % inner.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    order = torch.tensor([1, 0, 1], device=device)
    passing = Pass(inner)
    try:
        passing.prompts(ids[:, :5], mask[:, :5])
        passing.keep(order)
        found = passing.token(ids[order, 5], mask[order], mask_positions(mask)[order, 5])
        expected = Pass(inner).prompts(ids, mask)[order]
    except Exception:  # of the model's own methods
        return False
    if not expected.isfinite().all():
        return None
    # Rounding differs; the state of another row is no matter of rounding.
    return (found - expected).abs().max().item() <= 0.05 * expected.abs().max().item()
