"""What training does not touch, by its digests: a run goes on beside the same frozen weights and buffers alone."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ppo_runtime.models.value_head import HEAD_PREFIX
from ppo_runtime.ranks.agreement import agree_any
from ppo_runtime.ranks.gather import as_bytes
from ppo_runtime.ranks.presence import lost_ranks_named
from ppo_runtime.ranks.shards import here, whole
from ppo_runtime.resuming.records import StateRecord
from ppo_runtime.trainer import Trainer

_LOOKED_AT = 16
_KNOWN: WeakKeyDictionary[Trainer, dict[bool, tuple[list[Any], str]]] = WeakKeyDictionary()


def frozen_digest(trainer: Trainer, *, reference_head: bool = False) -> str:
    """SHA-256 of all weights that training does not touch: the reference's, and the policy's frozen ones.

    Where ranks hold parts of the weights, :func:`know_frozen` comes before. Without the reference's value head,
    which nothing reads and which may be drawn anew with every start. It is computed anew only when a weight is another
    tensor than at the last time, or has changed: torch counts what is done to one, and some of its entries are looked
    at, since nothing counts what is done to its ``data``.
    """
    known = _KNOWN.setdefault(trainer, {})
    marks = _marks(trainer, reference_head)
    if reference_head not in known or known[reference_head][0] != marks:
        digest = hashlib.sha256()
        for name, weight in _frozen(trainer, reference_head):
            _add(digest, name, whole(weight))
        known[reference_head] = marks, digest.hexdigest()
    return known[reference_head][1]


def know_frozen(trainer: Trainer) -> None:
    """Have the digest at hand on all ranks, each of which may then ask for it alone; a collective.

    What has changed may be rows that one of them holds.
    """
    known, phase = _KNOWN.setdefault(trainer, {}), "the comparison of frozen weights"
    changed = False not in known or known[False][0] != _marks(trainer, False)
    if agree_any(changed, trainer.world, phase):
        known.pop(False, None)
        with lost_ranks_named(trainer.world, phase):
            frozen_digest(trainer)


def _frozen(trainer: Trainer, reference_head: bool) -> Iterator[tuple[str, Tensor]]:
    for model in (trainer.model, trainer.ref_model):
        for name, parameter in [] if model is None else sorted(model.named_parameters()):
            unused = model is trainer.ref_model and name.startswith(HEAD_PREFIX) and not reference_head
            if not parameter.requires_grad and not unused:
                yield name, parameter


def _marks(trainer: Trainer, reference_head: bool) -> list[tuple[Any, ...]]:
    return [_mark(name, weight) for name, weight in _frozen(trainer, reference_head)]


def _mark(name: str, weight: Tensor) -> tuple[Any, ...]:
    """What tells cheaply that a weight is as it was, from what this rank holds of it."""
    made = object() if weight.is_inference() else weight._version  # torch counts nothing of the former: never the same
    weight = here(weight)
    entries = weight.detach().flatten()[:: max(1, weight.numel() // _LOOKED_AT)]
    return name, weight.data_ptr(), made, weight.dtype, tuple(weight.shape), as_bytes(entries).numpy().tobytes()


def frozen_buffers(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of each buffer of the reference; those of the policy, shared ones too, are in its checkpoint.

    Only of those that belong to its state.
    """
    if trainer.ref_model is None:
        return {}
    theirs = {id(buffer) for buffer in stored_buffers(trainer.model).values()}
    digests: dict[str, str] = {}
    for name, buffer in stored_buffers(trainer.ref_model).items():
        if id(buffer) not in theirs:
            digest = hashlib.sha256()
            _add(digest, name, buffer)
            digests[name] = digest.hexdigest()
    return digests


def check_frozen(source: Path, state: StateRecord, trainer: Trainer) -> None:
    """Refuse a checkpoint that was made beside other frozen weights or buffers; ``state`` is what it holds."""
    advice = "make the trainer from the same original model and reference, not from trained weights"
    then = state.frozen
    known = frozen_digest(trainer) == then
    if state.format == 1 and not known:  # which may have hashed the reference's unused value head as well
        known = frozen_digest(trainer, reference_head=True) == then
    if not known:
        raise ValueError(
            f"{source} was made beside other frozen weights: the reference, or the layers that do not train, "
            f"differ; {advice}"
        )
    if (buffers := state.frozen_buffers) is None:  # and those of before that knew nothing of buffers
        return
    now = frozen_buffers(trainer)
    if differing := sorted(name for name in {*buffers, *now} if buffers.get(name) != now.get(name)):
        raise ValueError(
            f"{source} was made beside other frozen buffers: {len(differing)} of the reference's differ, such as "
            f"{differing[0]!r}; {advice}"
        )


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's state; the others are made anew with it, or while it runs."""
    kept = set(model.state_dict(keep_vars=True).values())
    return {name: buffer for name, buffer in model.named_buffers() if buffer in kept}


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(as_bytes(tensor).numpy().data)
