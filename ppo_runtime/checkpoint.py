"""Checkpoints from which training goes on bit for bit: tensors in safetensors, everything else in JSON, no pickle.

A checkpoint is a directory: ``policy.safetensors`` (the parameters that train, and buffers), ``optimizer.safetensors``,
``state.json`` (counters, controller, scheduler, configuration) and one ``rank-<n>.json`` for the random generators and
the place in the data of each process. What never changes, the reference above all, is not stored; a digest of it is,
so that a checkpoint is not continued against another reference.
"""

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppo_runtime.common.redact import plain_settings
from ppo_runtime.common.trees import plain, restored
from ppo_runtime.learning.optimisers import check_kind_of_scheduler
from ppo_runtime.ranks.gather import agree_any, all_or_none
from ppo_runtime.ranks.generators import generator_states, restore_generators
from ppo_runtime.resuming.fitting import (
    check_optimizer_state,
    check_scheduler_state,
    check_tensors,
    optimizer_made_of,
    scheduler_class,
    warn_of_differences,
)
from ppo_runtime.resuming.frozen import check_frozen, frozen_buffers, frozen_digest, stored_buffers
from ppo_runtime.rollout.data import PromptBatches, prompt_digest
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 1
_POLICY, _OPTIMIZER, _STATE = "policy.safetensors", "optimizer.safetensors", "state.json"
# What file managers and network disks leave in any directory.
_LEFT_BY_SYSTEMS = re.compile(r"\.DS_Store|Thumbs\.db|desktop\.ini|\.nfs.*")
_OURS = re.compile(rf"{re.escape(_POLICY)}|{re.escape(_OPTIMIZER)}|{re.escape(_STATE)}|rank-\d+\.json")
_WHOLE = "what save_checkpoint wrote; copy the checkpoint again, or remove it and go on from another"
_ENTRIES = "world_size", "frozen", "config", "optimizer", "lr_scheduler", "trainer"
_MISFITS = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)
# Where a run's files go has no influence on its numbers.
_INDIFFERENT = frozenset(
    {"exp_name", "log_with", "tracker_kwargs", "project_kwargs", "tracker_project_name", "steps", "accel_strict"}
)


def save_checkpoint(trainer: Trainer, directory: str | Path) -> Path:
    """Write everything needed to go on from here; call it between two steps, on every rank.

    Atomic: a checkpoint of this name is complete or not there. One that it replaces is removed only once the new one
    is on disk.

    Args:
        trainer: after any number of steps.
        directory: the checkpoint to make, a directory of its own: one that is there must be empty or a checkpoint. Its
            parent is made as well.

    Returns:
        ``directory`` as a path.

    Raises:
        ValueError: ``directory`` is a file, a mount point or holds something else than a checkpoint; weights or the
            optimiser's moments are not finite, or the last step was broken off while it was moving them. What is there
            is kept.
        TypeError: the optimiser or the scheduler holds something that JSON and tensors cannot express.
        OSError: the directory cannot be made or replaced. What is there is kept.
        RuntimeError: another rank could not write its part.
    """
    target, world, made = _resolved(directory), trainer.world, Path(directory).absolute()
    stands_in_it = _is_working_directory(target)
    with all_or_none(world):  # nobody writes before the directory is there
        check_replaceable(target)
        draft, previous = _siblings(target)
        if world.rank == 0:
            with _told(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
    complete = False
    try:
        _check_worth_keeping(trainer)
        _write_json(draft / f"rank-{world.rank}.json", plain(_rank_state(trainer), f"rank-{world.rank}"))
        if world.rank == 0:
            _write_shared(trainer, draft)
        complete = True
    finally:
        failed_somewhere = agree_any(not complete, world)
        if failed_somewhere and world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
    if failed_somewhere:
        raise RuntimeError(f"no checkpoint was made in {target}: a rank failed to write its part, see its traceback")
    with all_or_none(world):  # nobody goes on before it is in place
        if world.rank == 0:
            with _told(target):
                _put_in_place(draft, target, previous)
            _sync(target.parent)
            shutil.rmtree(previous, ignore_errors=True)
    if stands_in_it:
        os.chdir(target)  # the working directory was replaced: without this the process would stand in a removed one
    return made


def load_checkpoint(trainer: Trainer, directory: str | Path) -> None:
    """Bring a freshly made trainer to where ``save_checkpoint`` was called.

    Make it from the same original model, reference, dataset and kind of optimiser and scheduler; the reference is the
    policy as it was *before* training, so do not start from the trained weights. Settings may differ, and are named in
    a warning if they do: the continuation is then not the one that would have been. Another ``learning_rate`` holds
    from here on, unless a scheduler goes on from the checkpoint's. Call it on every rank.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, belongs to another model, reference, optimiser, scheduler or world size, or was made
            by a later version. The trainer is unchanged then.
        RuntimeError: another rank could not load it.
    """
    with all_or_none(trainer.world):
        source = _existing(_resolved(directory))
        state = _read_state(source)
        if state["world_size"] != trainer.world.size:
            raise ValueError(
                f"{source} was written by {state['world_size']} ranks, but there are {trainer.world.size}; "
                "start as many processes as then"
            )
        with _named_if_damaged(source):
            weights = load_file(source / _POLICY, device="cpu")
            optimizer = restored(state["optimizer"], load_file(source / _OPTIMIZER, device="cpu"))
            scheduler = restored(state["lr_scheduler"], {})
            own = restored(state["trainer"], {})
            rank = restored(_read_json(source / f"rank-{trainer.world.rank}.json"), {})
        check_tensors(source, weights, _trained(trainer.model))
        with _named_if_damaged(source):
            check_frozen(source, state, trainer)
            check_scheduler_state(source, state, trainer.lr_scheduler)
            check_optimizer_state(source, state.get("optimizer_made_of"), optimizer, trainer)
            _check_data(source, rank, trainer)
        rates = [group.get("lr") for group in trainer.optimizer.param_groups]
        with _undone_unless_whole(source, trainer):
            trainer.optimizer.load_state_dict(optimizer)
            if trainer.lr_scheduler is not None:
                trainer.lr_scheduler.load_state_dict(scheduler)
            _restore_generators(trainer, rank)
            trainer.load_state_dict(own)  # last, since it drops the gradients that wait for an update
        trainer.broken_off = f"the loading of {source} was broken off"
        with torch.no_grad():
            for name, tensor in _trained(trainer.model).items():
                tensor.copy_(weights[name])
        trainer.broken_off = None
        # Whatever is logged next belongs behind the checkpoint's steps. From here on another branch of the run may be
        # made from a copy of the same checkpoint: they are told apart.
        trainer.log.go_on(trainer.current_step, (*state.get("earlier_runs", ()), state.get("run")))
        changed = warn_of_differences(
            state["config"], _configuration(trainer), scheduled=trainer.lr_scheduler is not None
        )
        if "learning_rate" in changed and trainer.lr_scheduler is None:
            for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
                if rate is not None:
                    group["lr"] = rate


def steps_done(directory: str | Path) -> int | None:
    """How many steps a checkpoint stands after; None if there is none, complete, of this name."""
    try:
        source = _existing(_resolved(directory))
    except FileNotFoundError:
        return None
    state = _read_state(source)
    with _named_if_damaged(source):
        return restored(state["trainer"], {})["current_step"]


def check_replaceable(directory: str | Path) -> None:
    """Refuse to make a checkpoint where something else is, which would be lost.

    Raises:
        ValueError: ``directory`` is a file, a mount point, or holds anything but a checkpoint's files.
    """
    target = _resolved(directory)
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file, expected the directory of a checkpoint; take another name")
    names = {entry.name for entry in target.iterdir()}
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, expected a directory that a new checkpoint can replace; take one in it, such "
            f"as {target / 'checkpoint'}"
        )
    others = sorted(name for name in names if not _OURS.fullmatch(name) and not _LEFT_BY_SYSTEMS.fullmatch(name))
    if names and (others or _STATE not in names):
        held = others[0] if others else f"no {_STATE}"
        raise ValueError(
            f"{target} holds {held}, and so is not a checkpoint alone, which a new one could replace; give the "
            f"checkpoint a directory of its own, such as {target / 'checkpoint'}"
        )


def check_storable(trainer: Trainer) -> None:
    """Refuse an optimiser, a scheduler or a state of the trainer's that no checkpoint could hold.

    Raises:
        TypeError: it is none of what JSON and tensors can express, by its place.
    """
    scheduler = trainer.lr_scheduler
    if scheduler is not None:
        check_kind_of_scheduler(scheduler)
        plain(scheduler.state_dict(), "lr_scheduler")
    plain(trainer.optimizer.state_dict(), "optimizer", {})
    plain(trainer.state_dict(), "trainer")


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once, by its first name; tied weights share one entry."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return parameters | stored_buffers(model)


def _check_worth_keeping(trainer: Trainer) -> None:
    """Refuse what no run could go on from."""
    if trainer.broken_off is not None:
        raise ValueError(
            f"{trainer.broken_off}, and so the weights are between two steps: no checkpoint is made of them; make one "
            "after the next whole step, or load the last one"
        )
    if trainer.lr_scheduler is not None:
        check_kind_of_scheduler(trainer.lr_scheduler)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    moments: dict[str, Tensor] = {}
    plain(trainer.optimizer.state_dict(), "optimizer", moments)
    for name, tensor in (weights | moments).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            lower = "lower learning_rate" if trainer.lr_scheduler is None else "lower the scheduler's learning rates"
            raise ValueError(
                f"{name} holds numbers that are not finite: no checkpoint is made of them; load the last one, and "
                f"{lower} or set max_grad_norm"
            )


def _write_shared(trainer: Trainer, draft: Path) -> None:
    optimizer_tensors: dict[str, Tensor] = {}
    scheduler = None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()
    state = {
        "format": FORMAT,
        "world_size": trainer.world.size,
        "frozen": frozen_digest(trainer),
        "frozen_buffers": frozen_buffers(trainer),
        "config": _configuration(trainer),
        "optimizer": plain(trainer.optimizer.state_dict(), "optimizer", optimizer_tensors),
        "optimizer_made_of": optimizer_made_of(trainer),
        "lr_scheduler": None if scheduler is None else plain(scheduler, "lr_scheduler"),
        "scheduler_class": scheduler_class(trainer.lr_scheduler),
        "trainer": plain(trainer.state_dict(), "trainer"),
        "run": trainer.log.run_name,
        "earlier_runs": trainer.log.earlier_runs,
    }
    _write_tensors(draft / _POLICY, _trained(trainer.model))
    _write_tensors(draft / _OPTIMIZER, optimizer_tensors)
    _write_json(draft / _STATE, state)


def _rank_state(trainer: Trainer) -> dict[str, Any]:
    return _generators(trainer) | {"prompts": prompt_digest(getattr(trainer.dataloader, "dataset", None))}


def _generators(trainer: Trainer) -> dict[str, Any]:
    """The random generators of this process, and its place in the data."""
    data = _batches(trainer)
    states = generator_states(trainer.shuffle, trainer.device)
    return states | {"data": None if data is None else data.state_dict()}


def _restore_generators(trainer: Trainer, state: Mapping[str, Any]) -> None:
    data = _batches(trainer)
    if state["data"] is not None and data is not None:
        data.load_state_dict(state["data"])
    restore_generators(state, trainer.shuffle, trainer.device)


@contextmanager
def _undone_unless_whole(source: Path, trainer: Trainer) -> Iterator[None]:
    """Put back what was taken over, where the rest cannot be. The weights, which always fit, come afterwards."""
    scheduler = trainer.lr_scheduler
    optimizer, own, generators = trainer.optimizer.state_dict(), trainer.state_dict(), _generators(trainer)
    broken_off = trainer.broken_off
    scheduled = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
    try:
        yield
    except BaseException as error:
        trainer.optimizer.load_state_dict(optimizer)
        if scheduler is not None:
            scheduler.load_state_dict(scheduled)
        if trainer.state_dict() != own:
            trainer.load_state_dict(own)
        trainer.broken_off = broken_off
        _restore_generators(trainer, generators)
        if isinstance(error, _MISFITS):
            raise ValueError(
                f"{source} does not fit this trainer: {type(error).__name__}: {error}; make the optimizer and the "
                "lr_scheduler as they were made then. Nothing has changed"
            ) from error
        raise


def _check_data(source: Path, state: Mapping[str, Any], trainer: Trainer) -> None:
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


def _batches(trainer: Trainer) -> PromptBatches | None:
    """What knows the place in the data; a dataloader of the user's own does not."""
    batches = getattr(trainer.dataloader, "batch_sampler", None)
    return batches if isinstance(batches, PromptBatches) else None


def _configuration(trainer: Trainer) -> dict[str, Any]:
    return {name: value for name, value in plain_settings(trainer.config).items() if name not in _INDIFFERENT}


# --- files -------------------------------------------------------------------------------------------------------


def _siblings(target: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the one that it replaces waits meanwhile."""
    return target.with_name(f".{target.name}.draft"), target.with_name(f".{target.name}.previous")


def _put_in_place(draft: Path, target: Path, previous: Path) -> None:
    """Rename a whole draft; where that fails, what it should have replaced is there again and the draft is gone."""
    try:
        _sync(draft)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        draft.rename(target)
    except BaseException:
        if previous.exists() and not target.exists():
            previous.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Say of what the system refuses that no checkpoint was made, and what to do."""
    try:
        yield
    except OSError as error:
        said = (
            f"no checkpoint was made in {target}: {error}. What was there is kept; give the checkpoint a directory "
            f"that can be made and renamed where it lies, such as {target / 'checkpoint'}"
        )
        raise (OSError(said) if error.errno is None else OSError(error.errno, said)) from error


def _is_working_directory(target: Path) -> bool:
    try:
        return target.samefile(os.curdir)
    except OSError:  # one of them is not there
        return False


def _resolved(directory: str | Path) -> Path:
    """The directory itself, where it is named by a link or with dots."""
    return Path(directory).resolve()


def _read_state(source: Path) -> dict[str, Any]:
    """What ``state.json`` holds, of this format and with all that it must have."""
    state = _read_json(source / _STATE)
    found = state.get("format") if isinstance(state, dict) else None
    if found is not None and found != FORMAT:
        raise ValueError(f"{source} has format {found}, expected {FORMAT}; use the version that wrote it")
    missing = [name for name in ("format", *_ENTRIES) if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"{source / _STATE} has no {missing[0]!r}, expected {_WHOLE}")
    return state


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} cannot be read ({error}), expected {_WHOLE}") from error


@contextmanager
def _named_if_damaged(source: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, FileNotFoundError, AttributeError, LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"{source} cannot be read ({type(error).__name__}: {error}), expected {_WHOLE}") from error


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
