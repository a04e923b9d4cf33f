"""Reference models: a frozen copy, a copy that shares the bottom layers, or the policy without its adapter."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

from torch import nn

from ppo_runtime.models.inner import is_peft_model, pretrained_model, transformers_model

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYER_PATTERNS = (
    "transformer.h.{layer}",  # GPT-2, GPT-J, Bloom
    "model.decoder.layers.{layer}",  # OPT, BART
    "model.encoder.layers.{layer}",  # BART
    "led.decoder.layers.{layer}",  # LED
    "led.encoder.layers.{layer}",  # LED
    "gpt_neox.layers.{layer}",  # GPT-NeoX, Pythia
    "model.layers.{layer}",  # LLaMA, Qwen, Mistral, Gemma
    "encoder.block.{layer}",  # T5
    "decoder.block.{layer}",  # T5
)
# What lies below the first layer besides nn.Embedding: projections and norms of the word embeddings.
_BELOW_LAYERS = ("project_in", "word_embeddings_layernorm", "layernorm_embedding")


def create_reference_model(model: ModelT, num_shared_layers: int | None = None, pattern: str | None = None) -> ModelT:
    """A frozen copy of `model` in evaluation mode; the policy to stay close to.

    With `num_shared_layers` the embeddings and that many bottom layers of the copy are the policy's own tensors,
    and frozen in the policy as well, which saves their memory twice: as weights and as optimiser state. An
    encoder-decoder shares the bottom of both its stacks. Where the LM head is tied to the embeddings it is
    shared and frozen with them. Create the optimiser afterwards, over the parameters that still train.

    `pattern` names the layers of other architectures, with `{layer}` for the number: "model.blocks.{layer}".
    """
    whole = isinstance(num_shared_layers, Integral) and not isinstance(num_shared_layers, bool)
    if num_shared_layers is not None and not (whole and num_shared_layers >= 0):
        raise ValueError(f"num_shared_layers is {num_shared_layers!r}, expected None or a whole number from 0")
    if not num_shared_layers:
        memo = {}
    elif is_peft_model(pretrained_model(model)):
        raise ValueError(
            f"num_shared_layers is {num_shared_layers}, but the model has a PEFT adapter and shares all its layers "
            "already; use reference_context(model) instead of a reference model"
        )
    else:
        shared = list(_shared_modules(model, num_shared_layers, pattern))
        # deepcopy takes what its memo holds for copied already: the shared tensors stay the same objects.
        memo = {id(parameter): parameter for module in shared for parameter in module.parameters()}
    reference = copy.deepcopy(model, memo)
    reference.requires_grad_(False)  # the shared tensors in the policy too
    return reference.eval()


def is_own_base(model: Any, reference: Any) -> bool:
    """Whether a reference is the very base model under a PEFT policy's adapter, and not that adapter with it."""
    return (
        is_peft_model(pretrained_model(model))
        and not is_peft_model(pretrained_model(reference))
        and transformers_model(reference) is transformers_model(model)
    )


def check_apart(model: nn.Module, reference: nn.Module) -> None:
    """Refuse a reference that holds parameters which the policy trains; neither is changed.

    Frozen by way of the reference, they would not train; training, they would move the reference. Parameters that are
    frozen in the policy as well, as `create_reference_model(model, num_shared_layers)` leaves them, may be shared.

    Raises:
        ValueError: some are shared, by name.
    """
    theirs = {place for parameter in reference.parameters() for place in _places(parameter)}
    mine = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    shared = [name for name, parameter in mine if theirs & _places(parameter)]
    if shared:
        raise ValueError(
            f"ref_model shares {len(shared)} of the {len(mine)} parameters that train with model, such as "
            f"{_sample(shared)}; expected a reference that stays as it is: pass ref_model=None for a copy of the "
            "policy (or the policy without its adapter), or create_reference_model(model), or load one of its own"
        )


def _places(parameter: nn.Parameter) -> set[tuple[str, int]]:
    """Identifies a parameter by object and by memory, since another object may be a view of it."""
    memory = parameter.data_ptr() if parameter.device.type != "meta" and parameter.numel() else 0
    return {("object", id(parameter))} | ({(str(parameter.device), memory)} if memory else set())


def _shared_modules(model: nn.Module, count: int, pattern: str | None) -> Iterator[nn.Module]:
    parts = dict(model.named_modules())
    patterns = LAYER_PATTERNS if pattern is None else (pattern,)
    layers = {name: place for name in parts if (place := _place(name, patterns)) is not None}
    if not layers:
        names = [name for name, _ in model.named_parameters()]
        raise ValueError(
            f"no layers match {' or '.join(repr(p) for p in patterns)} in {type(model).__name__}; pass a pattern "
            f"with {{layer}} in place of the layer's number. Its parameters are named like {_sample(names)}"
        )
    for stack, depth in Counter(stack for stack, _ in layers.values()).items():
        if count > depth:
            raise ValueError(
                f"num_shared_layers is {count}, but {stack!r} has only {depth} layers; share at most those"
            )
    for name, part in parts.items():
        index = next((i for layer, (_, i) in layers.items() if f"{name}.".startswith(f"{layer}.")), None)
        below = isinstance(part, nn.Embedding) or name.rpartition(".")[2] in _BELOW_LAYERS
        if below if index is None else index < count:
            yield part


def _place(name: str, patterns: Iterable[str]) -> tuple[str, int] | None:
    """The stack and the number of the layer whose module has this very name, or None."""
    for pattern in patterns:
        before, found, after = pattern.strip(".").partition("{layer}")
        if not found:
            raise ValueError(f"pattern is {pattern!r}, expected {{layer}} in it, as in {LAYER_PATTERNS[0]!r}")
        if match := re.search(rf"^((?:.*\.)?{re.escape(before)})(\d+){re.escape(after)}$", name):
            return match[1], int(match[2])
    return None


def _sample(names: list[str], most: int = 4) -> str:
    """A few names from across the model, for an error message."""
    step = max(1, len(names) // most)
    return ", ".join(repr(name) for name in names[::step][:most])


@contextmanager
def reference_context(model: nn.Module) -> Iterator[None]:
    """A PEFT policy with its adapter switched off, which makes it its own reference.

    On the way out, exceptions included, the adapter is back and every parameter trains or not as it did before:
    peft alone would make a frozen adapter trainable.
    """
    inner = pretrained_model(model)
    if not is_peft_model(inner):
        raise ValueError(
            f"{type(inner).__name__} has no PEFT adapter to switch off; make a reference with create_reference_model"
        )
    flags = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    try:
        with inner.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
