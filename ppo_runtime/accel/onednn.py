"""Packs a model's linear layers for the length of one rollout, by the oneDNN that stock torch brings.

A decode step multiplies a few rows with every weight of the model. oneDNN does that about twice as fast as MKL where
the weights lie in blocks that suit it. Blocks are copies and don't follow an optimiser: so they are made anew at every
entry, serve passes without gradients only, and are gone at the end, with the model as it was.

The operators are torch's own, but private to its compiler: whether they are there, and give what the plain layers
give, is tried on each model before it is relied on.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ppo_runtime.accel.backends import TOLERANCE, AccelError
from ppo_runtime.accel.probing import first_line
from ppo_runtime.accel.products import by_name, filled
from ppo_runtime.common.memory import own_share
from ppo_runtime.models.inner import is_merged
from ppo_runtime.models.precision import is_widened
from ppo_runtime.models.stand_ins import has_own_forward, standing_in

logger = logging.getLogger(__name__)

PAYING_STEPS = 12
"""New tokens from which on faster steps make up for the copies."""
_SMALLEST = 2**12
# What was found out about a model, and the sentences said of it.
_tried: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def rollout_layers(model: nn.Module, requested: str, *, strict: bool, steps: int) -> AbstractContextManager[Any]:
    """What to generate in: with packed layers where ``requested`` allows it and it pays, else as the model is.

    Args:
        model: a transformers model.
        requested: "eager" never packs; "onednn" does wherever it can be done, and every other name where it pays too.
        strict: refuse to go without where "onednn" is requested.
        steps: new tokens of a response at most.

    Raises:
        AccelError: ``strict``, and the layers can't be packed; the message says why.
    """
    if requested == "eager" or (requested != "onednn" and steps < PAYING_STEPS):
        return nullcontext()
    why = obstacle(model)
    if why is None:
        if model not in _tried:
            _tried[model] = _disagreement(model)
        why = _tried[model]
    insisted = requested == "onednn"
    if why is not None and insisted and strict:
        raise AccelError(f"acceleration 'onednn' is strict, but {why}; or set PPOConfig(accel_strict=False)")
    count = len(_layers(model))
    reason = f"{count} linear layers are packed by oneDNN for each" if why is None else f"eager torch: {why}"
    if _said.get(model) != reason:
        _said[model] = reason
        logger.log(logging.WARNING if insisted and why is not None else logging.INFO, "rollouts: %s", reason)
    return nullcontext() if why is not None else packed(model)


def obstacle(model: nn.Module) -> str | None:
    """What is in the way of packing a model's linear layers, None if nothing; no layer is touched."""
    name, layers = type(model).__name__, _layers(model)
    if not all(hasattr(torch.ops.mkldnn, operator) for operator in ("_reorder_linear_weight", "_linear_pointwise")):
        return f"torch {torch.__version__} has no oneDNN operators to pack linear layers with"
    if not torch.backends.mkldnn.is_available():
        return f"torch {torch.__version__} is built without oneDNN"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return f"{name} is not on the CPU, for which alone oneDNN packs here"
    if is_merged(model):
        return f"{name} has an adapter that is merged, which peft takes out again whenever a pass asks for it"
    if is_widened(model):
        return f"{name} computes in bfloat16, and float32 layers alone are packed"
    if not layers:
        return f"{name} has no plain float32 linear layers"
    needed, available = sum(layer.weight.nbytes for layer in layers), own_share()
    if available is not None and needed > available / 2:
        return f"the packed weights would take {needed >> 20} MiB, more than half of the {available >> 20} MiB left"
    return None


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, the model's plain float32 linear layers compute with packed copies of their weights as they are now.

    For passes without gradients: others go through the layers as they were. Parameters, buffers and the state dict stay
    the model's own. Weights must not change inside.
    """
    with standing_in(_layers(model), _forward):
        yield


def _forward(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass with its weight in blocks."""
    weight, bias = _matrix(layer), layer.bias
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    added = None if bias is None else bias.detach()

    def forward(rows: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or rows.dtype is not torch.float32
        if plain or not rows.numel():
            return type(layer).forward(layer, rows)
        flat = rows.reshape(-1, rows.shape[-1])
        found = torch.ops.mkldnn._linear_pointwise(filled(flat), blocks, added, "none", [], "")
        return found[: len(flat)].view(*rows.shape[:-1], found.shape[-1])

    return by_name(layer, forward)


def _matrix(layer: Any) -> Tensor:
    """The weight [out, in]; GPT-2 keeps it the other way round."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _layers(model: nn.Module) -> list[Any]:
    """The linear layers that can be packed: whoever has put a forward pass of their own into a layer keeps it.

    So does whoever makes its weight when it is called (pruning, weight norm): until then there is the last call's.
    """
    modules: list[Any] = list(model.modules())
    return [
        layer
        for layer in modules
        if type(layer) in (nn.Linear, Conv1D)
        and not has_own_forward(layer)
        and not layer._forward_pre_hooks
        and isinstance(layer.weight, nn.Parameter)
        and layer.weight.dtype is torch.float32
        and layer.weight.device.type == "cpu"
        and layer.weight.numel() >= _SMALLEST
    ]


def _disagreement(model: nn.Module) -> str | None:
    """How a few rows through packed layers differ from those through plain ones; None if they agree.

    One layer of each shape is tried. A NaN agrees with nothing.
    """
    name = type(model).__name__
    kinds = {(type(layer), layer.weight.shape, layer.bias is None): layer for layer in _layers(model)}
    for layer in kinds.values():
        width = _matrix(layer).shape[1]
        rows = torch.linspace(-1, 1, 3 * width, dtype=torch.float32).reshape(width, 3).T.contiguous()
        try:
            # Whatever the caller has around it: under autocast the plain layer would be compared with itself.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                plain, fast = type(layer).forward(layer, rows), _forward(layer)(rows)
            difference = (fast - plain).abs().max().item()
        except Exception as error:
            return f"oneDNN could not pack {name} ({first_line(error)})"
        if not difference <= TOLERANCE * max(1.0, plain.abs().max().item()):
            return f"a layer of {name} packed by oneDNN is not what it was (it differs by {difference:.3g})"
    return None
