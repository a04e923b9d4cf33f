"""Context managers that take the randomness out of a forward pass and put every flag back afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ppo_runtime.common.undoing import undoing


@contextmanager
def dropout_off(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every submodule's own `training` flag is restored on the way out.

    For passes without gradients. Gradient checkpointing is inactive in evaluation mode, so the training
    forward needs `without_dropout` instead.
    """
    with undoing() as undo:
        for part in (part for module in modules for part in module.modules()):
            undo.append(partial(setattr, part, "training", part.training))
        for module in modules:
            module.eval()
        yield


@contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    """Modes as they are, with every dropout probability 0 and gradient checkpointing in force inside.

    transformers recomputes activations only in training mode, and hands models over in evaluation mode: inside, the
    modules that have checkpointing switched on are in training mode, and the others in whichever they were. A
    checkpointed layer runs again during backward, so `backward()` belongs inside this context as well: outside, the
    second run drops units that the first one kept, which torch reports as a CheckpointError where it notices.

    Covers `nn.Dropout` and its kin, and floats named after dropout (`attention_dropout`, `layerdrop`, `drop_prob`) or
    router jitter, which is where transformers' models keep them: attributes of modules, and fields of their `config`,
    which some read in every pass. A config that other models have as well is as it was on the way out.
    """
    with undoing() as undo:
        parts = {part for module in modules for part in module.modules()}
        for part in parts:
            wanted: dict[str, Any] = dict.fromkeys(_random_attributes(part), 0.0)
            if getattr(part, "gradient_checkpointing", False) is True and not part.training:
                wanted["training"] = True
            for name, value in wanted.items():
                undo.append(partial(setattr, part, name, getattr(part, name)))
                setattr(part, name, value)
        for config in _configs(parts):
            for name in _random_attributes(config):
                undo.append(partial(object.__setattr__, config, name, getattr(config, name)))
                object.__setattr__(config, name, 0.0)
        yield


def _configs(parts: Iterable[nn.Module]) -> list[Any]:
    """The modules' configurations, each object once; what has no attributes of its own is none."""
    found = (getattr(part, "config", None) for part in parts)
    return list({id(one): one for one in found if hasattr(one, "__dict__") and not isinstance(one, type)}.values())


def _random_attributes(holder: Any) -> list[str]:
    names = ["p"] if isinstance(holder, _DropoutNd) else []
    named = (name for name in vars(holder) if "drop" in name or "jitter" in name)
    # Only what is on: an attribute left alone cannot make a compiled graph recompile.
    return [name for name in (*names, *named) if isinstance(value := vars(holder)[name], float) and value > 0]


def recomputes(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on anywhere, so that a backward pass makes forward passes."""
    return any(getattr(part, "gradient_checkpointing", False) is True for part in model.modules())


def recomputes_within_backward(model: nn.Module) -> bool:
    """Whether checkpointing anywhere is of the re-entrant kind: a backward pass of its own inside the backward pass."""
    return any(
        getattr(getattr(part, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", True)
        for part in model.modules()
        if getattr(part, "gradient_checkpointing", False) is True
    )
