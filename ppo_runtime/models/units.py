"""The parts of a model whose weights travel together where every rank holds a share of them: its layers, and the rest.

A unit is gathered as a whole before it computes and let go afterwards, so that no more than one of them, and the rest,
are in memory. The rest, embeddings, head and value head, is needed from the beginning of a pass to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ppo_runtime.models.inner import transformers_model


class Unit(NamedTuple):
    """Weights that are gathered in one collective, whose gradients are summed in another."""

    name: str
    """Of the layer in the model; empty for the rest."""
    parameters: int
    """How many numbers."""
    bytes: int
    """What they take whole."""
    trained: int
    """How many of the numbers train."""
    trained_bytes: int
    """What their gradients take whole."""


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a model's trunk, of all its stacks, in the order of the modules: what stands in a list of its own.

    Lists within layers, of experts or of what T5 calls layers, are parts of those.
    """
    return list(_layers(transformers_model(model).base_model))


def sharding_plan(model: Any) -> list[Unit]:
    """The units of a policy or a reference, layers first, then the rest; weights that are tied count once.

    A model on the meta device will do, so that the plan of one which fits no machine can be had.
    """
    names = {id(part): name for name, part in model.named_modules()}
    seen: set[int] = set()
    units = [_unit(names[id(layer)], layer, seen) for layer in layers_of(model)]
    return [*units, _unit("", model, seen)]


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    for child in part.children():
        if not isinstance(child, nn.ModuleList):
            yield from _layers(child)
            continue
        yield from (layer for layer in child if any(True for _ in layer.parameters()))


def _unit(name: str, part: nn.Module, seen: set[int]) -> Unit:
    mine = [p for p in part.parameters() if id(p) not in seen]
    seen.update(map(id, mine))
    trained = [p for p in mine if p.requires_grad]
    return Unit(
        name,
        sum(p.numel() for p in mine),
        sum(p.nbytes for p in mine),
        sum(p.numel() for p in trained),
        sum(p.nbytes for p in trained),
    )
