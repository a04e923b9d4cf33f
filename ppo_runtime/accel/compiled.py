"""A frozen model whose layers go through torch.compile, beside the model itself and made of its very tensors.

The twin has no weights of its own: nothing is stored twice, the model's state dict keeps its names, and what is loaded
into the model is what the twin computes with.

Layers are compiled, not the trunk around them: they are alike and so share their graphs, which takes seconds where a
trunk of 30 takes minutes, and a pass may still leave out the bottom ones. Shapes are dynamic: rows end to end, padded
rows and a single row are a graph each, whatever their lengths.

It is measured to save little on a CPU, since the products of matrices stay as they are: 3% of a reference's pass of 135
million parameters beside torch's own. Where oneDNN's take less time, "auto" is the faster one.
"""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ppo_runtime.accel.probing import first_line
from ppo_runtime.models.inner import transformers_model

logger = logging.getLogger(__name__)

REMEDY = "see that a C++ compiler (g++) and Python's headers are installed, or do without: accel='eager'"


@attrs.define
class Trust:
    """What the layers of one twin have in common."""

    gives_way: bool = False
    """Whether eager torch goes on where the compiler fails, to which another shape may be news."""
    failed: bool = False
    """Whether it has, so that eager torch does."""


def compiled_twin(model: nn.Module) -> tuple[nn.Module, int, Trust]:
    """The same model, of the same tensors, with compiled layers; nothing is compiled before its first pass.

    Args:
        model: frozen; a transformers model, or a PEFT model of one.

    Returns:
        The twin, the number of its layers that are compiled, and what becomes of it where one can't be.
    """
    tensors = chain(model.parameters(), model.buffers())
    # deepcopy takes what its memo holds for copied already: the tensors stay the same objects.
    twin, trust = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval(), Trust()
    layers = list(_layers(transformers_model(twin).base_model))
    for layer in layers:
        vars(layer)["forward"] = _forward(layer, trust)  # goes before the method of its class
    return twin, len(layers), trust


def _forward(layer: nn.Module, trust: Trust) -> Callable[..., Any]:
    """The layer's forward pass, compiled wherever a graph knows the layer as it is."""
    plain, parts = layer.forward, [part for part in layer.modules() if part is not layer]
    compiled: Any = torch.compile(plain, dynamic=True)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        # What watches operators would see none of a graph's.
        if trust.failed or torch.is_grad_enabled() or is_in_torch_dispatch_mode() or any(map(_altered, parts)):
            return plain(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except Exception as error:
            if not trust.gives_way:
                raise
            trust.failed = True
            name = type(layer).__name__
            logger.warning("eager torch from here on: %s failed compiled (%s); %s", name, first_line(error), REMEDY)
        return plain(*args, **kwargs)

    return forward


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    """The layers of a trunk's stacks: the outermost lists of modules, wherever they are."""
    for child in part.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _altered(part: Any) -> bool:
    """Whether somebody watches a part of a layer or has put another in its place, which a graph would not notice."""
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
