"""What a model computes beside its weights, as plain facts by names: two of the same facts and weights are one model.

Of the weights themselves the names, shapes and kinds are compared elsewhere. Left out is what says where a model came
from, how it was initialised and how it is run.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig

from ppo_runtime.models.inner import is_peft_model, pretrained_model, transformers_model

_INDIFFERENT = re.compile(
    r"_|.*(path|version|revision|init|dtype|torchscript)|auto_map|architectures|task|problem_type|id2label|label2id"
    r"|use_cache|output_|return_|megatron|loftq|eva_|corda_|lora_ga|inference_mode|(pad|bos|eos|sep)_token_id"
    # Which layers an adapter is on is told by its weights.
    r"|(target|exclude)_modules|modules_to_save|layers_(to_transform|pattern)|target_parameters|ensure_weight_tying"
)
# Which older configurations of models hold as well.
_OF_GENERATION = GenerationConfig().to_dict().keys() - {"decoder_start_token_id"}


def computed_by(model: Any) -> dict[str, Any]:
    """The facts of a model, in a wrapper and with adapters or without, as JSON would give them back."""
    facts = {f"{name} of the configuration": value for name, value in _fields(transformers_model(model).config)}
    if is_peft_model(inner := pretrained_model(model)):
        facts["the active adapters"] = list(inner.active_adapters)
        for adapter, config in inner.peft_config.items():
            facts |= {f"{name} of adapter {adapter!r}": value for name, value in _fields(config)}
    if (head := getattr(model, "v_head", None)) is not None:
        facts["dropout of the value head"] = getattr(getattr(head, "dropout", None), "p", 0.0)
    return json.loads(json.dumps(facts, default=str))


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    for name, value in config.to_dict().items():
        if isinstance(name, str) and name not in _OF_GENERATION and not _INDIFFERENT.match(name):
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    """A value without what is indifferent in it, in an order of its own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not _INDIFFERENT.match(str(key))}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
