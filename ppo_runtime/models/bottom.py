"""The bottom layers of a decoder-only trunk in which nothing trains: run once, taken again by every later pass.

All passes over the same rows agree there: those of all epochs, and the reference's where it shares the layers with the
policy. Both are found out by what operators read rather than told from names: of what lies below a layer's output,
whether anything trains, and which tensors it is. Layers are left out by another `forward` for the length of a pass,
so that whatever a model does around them stays its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_runtime.common.undoing import undoing
from ppo_runtime.models.heads import hidden_states, mask_positions, probe_rows
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.modes import dropout_off, recomputes
from ppo_runtime.models.stand_ins import standing_in


def frozen_depth(model: nn.Module) -> int:
    """How many layers from the bottom give outputs that nothing which trains has a part in; 0 where it can't be told.

    Tried anew at every call, on a few tokens: adapters, checkpointing and what trains may be others by then.
    """
    return 0 if all(parameter.requires_grad for parameter in transformers_model(model).parameters()) else _tried(model)


def shared_depth(model: nn.Module, reference: Callable[[], AbstractContextManager[Any]], depth: int) -> int:
    """``depth`` if that many bottom layers of the reference are made of the policy's very tensors, else 0.

    The reference is what a pass of it enters: it may be the policy, without its adapter.
    """
    if not depth:
        return 0
    mine, below = _boundary(model, depth)
    with reference() as other:
        if len(_layers(other)) < depth:
            return 0
        theirs, below_theirs = _boundary(other, depth)
    return depth if below == below_theirs and torch.equal(mine, theirs) else 0


@contextmanager
def recorded(model: nn.Module, depth: int) -> Iterator[list[Tensor]]:
    """The outputs [B, L, H] of the first ``depth`` layers in the passes inside, without gradient."""
    seen: list[Tensor] = []
    with _watched(_layers(model)[depth - 1 : depth], lambda _, __, output: seen.append(output.detach())):
        yield seen


@contextmanager
def _watched(layers: Sequence[nn.Module], hook: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Inside, the hook sees every pass of the layers; an interrupt while it is put there leaves none either."""
    with undoing() as undo:
        for layer in layers:
            undo.append(partial(_unhook, layer, hook))
            layer.register_forward_hook(hook)
        yield


def _unhook(layer: nn.Module, hook: Callable[..., None]) -> None:
    for key in [key for key, one in layer._forward_hooks.items() if one is hook]:
        del layer._forward_hooks[key]


@contextmanager
def replayed(model: nn.Module, depth: int, states: Tensor) -> Iterator[None]:
    """Passes inside leave the first ``depth`` layers out and go on from their outputs [B, L, H]."""
    if recomputes(model):
        # Re-entrant checkpointing gives a layer's parameters a gradient only where its input has one.
        states = states.detach().requires_grad_(torch.is_grad_enabled())
    # Nothing is there to be computed again.
    with standing_in(_layers(model)[:depth], lambda _: lambda *_, **__: states, gradient_checkpointing=False):
        yield


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    inner = transformers_model(model)
    count = getattr(inner.config.get_text_config(), "num_hidden_layers", 0)
    stacks = [part for part in inner.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return [] if inner.config.is_encoder_decoder or len(stacks) != 1 else list(stacks[0])


def _tried(model: nn.Module) -> int:
    """How many bottom layers read nothing that trains, if going on from there makes what the whole trunk makes.

    Layers whose outputs are more than a tensor hand on what upper ones may need.
    """
    layers = _layers(model)
    if not layers:
        return 0
    reading = _Reading(parameter for parameter in model.parameters() if parameter.requires_grad)
    outputs: list[Any] = []
    frozen: list[bool] = []

    def behind(layer: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output)
        frozen.append(not reading.read)

    with _watched(layers, behind), torch.no_grad(), dropout_off(model), reading:
        whole = hidden_states(model, *_probe(model))
    if len(outputs) != len(layers) or not all(isinstance(output, Tensor) for output in outputs):
        return 0
    depth = sum(frozen)
    if not depth:
        return 0
    try:
        with torch.no_grad(), dropout_off(model), replayed(model, depth, outputs[depth - 1].detach()):
            again = hidden_states(model, *_probe(model))
    except Exception:  # of the model's own code: upper layers read what lower ones leave elsewhere
        return 0
    return depth if torch.allclose(again, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max())) else 0


def _boundary(model: nn.Module, depth: int) -> tuple[Tensor, set[int]]:
    """The output of the first ``depth`` layers on a few tokens, and which parameters have been read for it."""
    reading = _Reading(transformers_model(model).parameters())
    outputs: list[Tensor] = []

    def at_boundary(layer: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output)
        reading.goes_on = False

    hook = _layers(model)[depth - 1].register_forward_hook(at_boundary)
    try:
        with torch.no_grad(), dropout_off(model), reading:
            hidden_states(model, *_probe(model))
    finally:
        hook.remove()
    return outputs[0], reading.read


class _Reading(TorchDispatchMode):
    """Sees which of some tensors operators take, as long as it goes on: no gradient of them has to be made for that."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor) for tensor in tensors}
        self.read: set[int] = set()
        self.goes_on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.goes_on:
            self.read |= self.known & {id(leaf) for leaf in tree_leaves((args, kwargs))}
        return func(*args, **(kwargs or {}))


def _probe(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions [2, 5] of a few tokens."""
    ids, _ = probe_rows(transformers_model(model))
    mask = torch.ones_like(ids)  # without padding, whose states may be no numbers
    return ids, mask, mask_positions(mask)
