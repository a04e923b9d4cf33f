"""Checkpoints from which training goes on bit for bit: tensors in safetensors, everything else in JSON, no pickle.

A checkpoint is a directory: ``policy.safetensors`` (the parameters that train, and buffers), ``optimizer.safetensors``,
``state.json`` (counters, controller, scheduler, configuration) and one ``rank-<n>.json`` for the random generators and
the place in the data of each process. What never changes, the reference above all, is not stored; a digest of it is,
so that a checkpoint is not continued against another reference.
"""

import hashlib
import json
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppo_runtime.data import PromptBatches, prompt_digest
from ppo_runtime.distributed import agree_any
from ppo_runtime.redact import plain_settings, without_secrets
from ppo_runtime.value_head import HEAD_PREFIX

if TYPE_CHECKING:
    from ppo_runtime.trainer import PPOTrainer

logger = logging.getLogger(__name__)

FORMAT = 1
_POLICY, _OPTIMIZER, _STATE = "policy.safetensors", "optimizer.safetensors", "state.json"
# Where a run's files go has no influence on its numbers.
_INDIFFERENT = frozenset(
    {"exp_name", "log_with", "tracker_kwargs", "project_kwargs", "tracker_project_name", "steps", "accel_strict"}
)


def save_checkpoint(trainer: "PPOTrainer", directory: str | Path) -> Path:
    """Write everything needed to go on from here; call it between two steps, on every rank.

    Atomic: a checkpoint of this name is complete or not there. One that it replaces is removed only once the new one
    is on disk.

    Args:
        trainer: after any number of steps.
        directory: the checkpoint to make. Its parent is made as well.

    Returns:
        ``directory`` as a path.

    Raises:
        ValueError: weights or the optimiser's moments are not finite, or the last step was broken off while it was
            moving them. A checkpoint that is there is kept.
        TypeError: the optimiser or the scheduler holds something that JSON and tensors cannot express.
        RuntimeError: another rank could not write its part.
    """
    target = Path(directory).absolute()
    draft, previous = _siblings(target)
    world = trainer.world
    if world.rank == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    agree_any(False, world)  # nobody writes before the directory is there
    complete = False
    try:
        _check_worth_keeping(trainer)
        _write_json(draft / f"rank-{world.rank}.json", _plain(_rank_state(trainer), f"rank-{world.rank}"))
        if world.rank == 0:
            _write_shared(trainer, draft)
        complete = True
    finally:
        failed_somewhere = agree_any(not complete, world)
        if failed_somewhere and world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    if failed_somewhere:
        raise RuntimeError(f"no checkpoint was made in {target}: a rank failed to write its part, see its traceback")
    if world.rank == 0:
        _sync(draft)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        draft.rename(target)
        _sync(target.parent)
        shutil.rmtree(previous, ignore_errors=True)
    agree_any(False, world)  # nobody goes on before it is in place
    return target


def load_checkpoint(trainer: "PPOTrainer", directory: str | Path) -> None:
    """Bring a freshly made trainer to where ``save_checkpoint`` was called.

    Make it from the same original model, reference, dataset and kind of optimiser and scheduler; the reference is the
    policy as it was *before* training, so do not start from the trained weights. Settings may differ, and are named in
    a warning if they do: the continuation is then not the one that would have been.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it belongs to another model, reference or world size, or was made by a later version. The trainer
            is unchanged then.
    """
    source = _existing(Path(directory).absolute())
    state = json.loads((source / _STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"{source} has format {state['format']}, expected {FORMAT}; use the version that wrote it")
    if state["world_size"] != trainer.world.size:
        raise ValueError(
            f"{source} was written by {state['world_size']} ranks, but there are {trainer.world.size}; "
            "start as many processes as then"
        )
    weights = load_file(source / _POLICY, device="cpu")
    _check_names(source, weights, _trained(trainer.model))
    # Checkpoints of before hashed the reference's unused value head as well.
    if state["frozen"] not in (frozen_digest(trainer), frozen_digest(trainer, reference_head=True)):
        raise ValueError(
            f"{source} was made beside other frozen weights: the reference, or the layers that do not train, differ; "
            "make the trainer from the same original model and reference, not from trained weights"
        )
    if (state["lr_scheduler"] is None) != (trainer.lr_scheduler is None):
        raise ValueError(
            f"{source} has {'no' if state['lr_scheduler'] is None else 'an'} lr_scheduler state, and the trainer has "
            f"{'none' if trainer.lr_scheduler is None else 'one'}; pass the same kind as then"
        )
    rank = _restored(json.loads((source / f"rank-{trainer.world.rank}.json").read_text(encoding="utf-8")), {})
    _check_data(source, rank, trainer)
    _warn_of_differences(state["config"], _configuration(trainer))

    trainer.optimizer.load_state_dict(_restored(state["optimizer"], load_file(source / _OPTIMIZER, device="cpu")))
    with torch.no_grad():
        for name, tensor in _trained(trainer.model).items():
            tensor.copy_(weights[name])
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict(_restored(state["lr_scheduler"], {}))
    trainer.load_state_dict(_restored(state["trainer"], {}))
    trainer.metrics_after = trainer.current_step
    _restore_rank(trainer, rank)


def steps_done(directory: str | Path) -> int | None:
    """How many steps a checkpoint stands after; None if there is none, complete, of this name."""
    try:
        source = _existing(Path(directory).absolute())
    except FileNotFoundError:
        return None
    return _restored(json.loads((source / _STATE).read_text(encoding="utf-8"))["trainer"], {})["current_step"]


def frozen_digest(trainer: "PPOTrainer", *, reference_head: bool = False) -> str:
    """SHA-256 of all weights that training does not touch: the reference's, and the policy's frozen ones.

    Without the reference's value head, which nothing reads and which may be drawn anew with every start.
    """
    digest = hashlib.sha256()
    for model in (trainer.model, trainer.ref_model):
        for name, parameter in [] if model is None else sorted(model.named_parameters()):
            unused = model is trainer.ref_model and name.startswith(HEAD_PREFIX) and not reference_head
            if not parameter.requires_grad and not unused:
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                raw = parameter.detach().cpu().flatten().contiguous().view(torch.uint8)
                digest.update(raw.numpy().data)
    return digest.hexdigest()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once, by its first name; tied weights share one entry."""
    kept = set(model.state_dict(keep_vars=True).values())
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer in kept}
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad} | buffers


def _check_worth_keeping(trainer: "PPOTrainer") -> None:
    """Refuse what no run could go on from."""
    if trainer.broken_off is not None:
        raise ValueError(
            f"{trainer.broken_off}, and so the weights are between two steps: no checkpoint is made of them; make one "
            "after the next whole step, or load the last one"
        )
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    moments: dict[str, Tensor] = {}
    _plain(trainer.optimizer.state_dict(), "optimizer", moments)
    for name, tensor in (weights | moments).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name} holds numbers that are not finite: no checkpoint is made of them; load the last one, and "
                "lower learning_rate or set max_grad_norm"
            )


def _write_shared(trainer: "PPOTrainer", draft: Path) -> None:
    optimizer_tensors: dict[str, Tensor] = {}
    scheduler = None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()
    state = {
        "format": FORMAT,
        "world_size": trainer.world.size,
        "frozen": frozen_digest(trainer),
        "config": _configuration(trainer),
        "optimizer": _plain(trainer.optimizer.state_dict(), "optimizer", optimizer_tensors),
        "lr_scheduler": None if scheduler is None else _plain(scheduler, "lr_scheduler"),
        "trainer": _plain(trainer.state_dict(), "trainer"),
    }
    _write_tensors(draft / _POLICY, _trained(trainer.model))
    _write_tensors(draft / _OPTIMIZER, optimizer_tensors)
    _write_json(draft / _STATE, state)


def _rank_state(trainer: "PPOTrainer") -> dict[str, Any]:
    data = _batches(trainer)
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002  set_seed seeds this generator
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        "shuffle": trainer.shuffle.get_state(),
        "data": None if data is None else data.state_dict(),
        "prompts": prompt_digest(getattr(trainer.dataloader, "dataset", None)),
    }


def _restore_rank(trainer: "PPOTrainer", state: Mapping[str, Any]) -> None:
    data = _batches(trainer)
    if state["data"] is not None and data is not None:
        data.load_state_dict(state["data"])
    trainer.shuffle.set_state(state["shuffle"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002  as above
    random.setstate(state["python"])


def _check_data(source: Path, state: Mapping[str, Any], trainer: "PPOTrainer") -> None:
    """Refuse a place in data of another length; say where the data itself differs, as far as that can be seen."""
    then, data = state["data"], _batches(trainer)
    if then is None or data is None:
        if trainer.dataloader is not None:
            logger.warning("the checkpoint's place in the data is not known here: the data begins again")
        return
    if then.get("rows", data.rows) != data.rows:
        raise ValueError(
            f"{source} was made with a dataset of {then['rows']} rows, and this one has {data.rows}; pass the dataset "
            "of then, or start a new run from the saved model"
        )
    prompts = prompt_digest(trainer.dataloader.dataset) if trainer.dataloader is not None else None
    if prompts is not None and state.get("prompts") not in (None, prompts):
        logger.warning("the run goes on with other prompts than the checkpoint's")


def _batches(trainer: "PPOTrainer") -> PromptBatches | None:
    """What knows the place in the data; a dataloader of the user's own does not."""
    batches = getattr(trainer.dataloader, "batch_sampler", None)
    return batches if isinstance(batches, PromptBatches) else None


def _configuration(trainer: "PPOTrainer") -> dict[str, Any]:
    return {name: value for name, value in plain_settings(trainer.config).items() if name not in _INDIFFERENT}


def _warn_of_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    then, now = without_secrets(then), json.loads(json.dumps(now, default=str))
    changed = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if changed:
        logger.warning("the run goes on with other settings than the checkpoint's: %s", "; ".join(changed))


def _check_names(source: Path, stored: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    differences = [
        *(f"{name} is missing from the model" for name in sorted(stored.keys() - present.keys())),
        *(f"{name} is missing from the checkpoint" for name in sorted(present.keys() - stored.keys())),
        *(
            f"{name} is {stored[name].dtype} {tuple(stored[name].shape)} in the checkpoint and "
            f"{present[name].dtype} {tuple(present[name].shape)} in the model"
            for name in sorted(stored.keys() & present.keys())
            if (stored[name].dtype, stored[name].shape) != (present[name].dtype, present[name].shape)
        ),
    ]
    if differences:
        raise ValueError(
            f"{source} was made with another model ({len(differences)} differences): {'; '.join(differences[:3])}"
        )


# --- trees of plain values ---------------------------------------------------------------------------------------


def _plain(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A tree as JSON can hold it, exactly; tensors go to ``tensors`` if given, else into the tree as numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        if tensors is None:
            return {"tensor": value.detach().cpu().tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors[where] = value
        return {"stored": where}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        items = [(_plain(k, where, tensors), _plain(v, f"{where}.{k}", tensors)) for k, v in value.items()]
        return {kind: items}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"{where} is a {type(value).__name__}, expected numbers, strings, tensors and containers of these: "
        "a checkpoint holds no pickled objects"
    )


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``_plain`` was given."""
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "stored" in value:
        return tensors[value["stored"]]
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if "array" in value:
        return np.array(value["array"], dtype=value["dtype"])
    if "tuple" in value:
        return tuple(_restored(item, tensors) for item in value["tuple"])
    kind, items = next(iter(value.items()))
    pairs = ((_restored(key, tensors), _restored(item, tensors)) for key, item in items)
    return Counter(dict(pairs)) if kind == "counter" else dict(pairs)


# --- files -------------------------------------------------------------------------------------------------------


def _siblings(target: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the one that it replaces waits meanwhile."""
    return target.with_name(f".{target.name}.draft"), target.with_name(f".{target.name}.previous")


def _existing(target: Path) -> Path:
    for candidate in (target, _siblings(target)[1]):
        if (candidate / _STATE).is_file():
            return candidate
    raise FileNotFoundError(f"{target} holds no {_STATE}, expected a directory made by save_checkpoint")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies, since safetensors refuses tensors that share memory.
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    _sync(path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, default=str) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
