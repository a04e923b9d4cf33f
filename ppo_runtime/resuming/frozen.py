"""What training does not touch, by its digests: a run goes on beside the same frozen weights and buffers alone."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ppo_runtime.models.value_head import HEAD_PREFIX
from ppo_runtime.ranks.gather import as_bytes
from ppo_runtime.trainer import Trainer


def frozen_digest(trainer: Trainer, *, reference_head: bool = False) -> str:
    """SHA-256 of all weights that training does not touch: the reference's, and the policy's frozen ones.

    Without the reference's value head, which nothing reads and which may be drawn anew with every start.
    """
    digest = hashlib.sha256()
    for model in (trainer.model, trainer.ref_model):
        for name, parameter in [] if model is None else sorted(model.named_parameters()):
            unused = model is trainer.ref_model and name.startswith(HEAD_PREFIX) and not reference_head
            if not parameter.requires_grad and not unused:
                _add(digest, name, parameter)
    return digest.hexdigest()


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


def check_frozen(source: Path, state: Mapping[str, Any], trainer: Trainer) -> None:
    """Refuse a checkpoint that was made beside other frozen weights or buffers; ``state`` is what it holds."""
    advice = "make the trainer from the same original model and reference, not from trained weights"
    then = state["frozen"]
    # Checkpoints of before hashed the reference's unused value head as well.
    if then != frozen_digest(trainer) and then != frozen_digest(trainer, reference_head=True):
        raise ValueError(
            f"{source} was made beside other frozen weights: the reference, or the layers that do not train, "
            f"differ; {advice}"
        )
    if (buffers := state.get("frozen_buffers")) is None:  # and those of before that knew nothing of buffers
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
