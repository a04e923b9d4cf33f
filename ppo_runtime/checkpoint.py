"""Checkpoints from which training goes on bit for bit: tensors in safetensors, everything else in JSON, no pickle.

A checkpoint is a directory: ``policy.safetensors`` (the parameters that train, and buffers), ``optimizer.safetensors``,
``state.json`` (counters, controller, scheduler, configuration) and one ``rank-<n>.json`` for the random generators and
the place in the data of each process. What never changes, the reference above all, is not stored; a digest of it is,
so that a checkpoint is not continued against another reference.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ppo_runtime.common.redact import plain_settings
from ppo_runtime.common.trees import plain, restored
from ppo_runtime.ranks.gather import agree_any, all_or_none
from ppo_runtime.resuming import files
from ppo_runtime.resuming.files import check_replaceable
from ppo_runtime.resuming.fitting import (
    check_optimizer_state,
    check_scheduler_state,
    check_tensors,
    optimizer_made_of,
    scheduler_class,
    warn_of_differences,
)
from ppo_runtime.resuming.frozen import check_frozen, frozen_buffers, frozen_digest, stored_buffers
from ppo_runtime.resuming.keeping import check_worth_keeping
from ppo_runtime.resuming.position import check_data, position, rank_state, restore_position
from ppo_runtime.trainer import Trainer

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
    target, world, made = files.resolved(directory), trainer.world, Path(directory).absolute()
    stands_in_it = files.is_working_directory(target)
    with all_or_none(world):  # nobody writes before the directory is there
        check_replaceable(target)
        draft, previous = files.siblings(target)
        if world.rank == 0:
            with files.told(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
    complete = False
    try:
        check_worth_keeping(trainer)
        files.write_json(draft / f"rank-{world.rank}.json", plain(rank_state(trainer), f"rank-{world.rank}"))
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
            with files.told(target):
                files.put_in_place(draft, target, previous)
            files.sync(target.parent)
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
        source = files.existing(files.resolved(directory))
        state = files.read_state(source)
        if state["world_size"] != trainer.world.size:
            raise ValueError(
                f"{source} was written by {state['world_size']} ranks, but there are {trainer.world.size}; "
                "start as many processes as then"
            )
        with files.named_if_damaged(source):
            weights = load_file(source / files.POLICY, device="cpu")
            optimizer = restored(state["optimizer"], load_file(source / files.OPTIMIZER, device="cpu"))
            scheduler = restored(state["lr_scheduler"], {})
            own = restored(state["trainer"], {})
            rank = restored(files.read_json(source / f"rank-{trainer.world.rank}.json"), {})
        check_tensors(source, weights, _trained(trainer.model))
        with files.named_if_damaged(source):
            check_frozen(source, state, trainer)
            check_scheduler_state(source, state, trainer.lr_scheduler)
            check_optimizer_state(source, state.get("optimizer_made_of"), optimizer, trainer)
            check_data(source, rank, trainer)
        rates = [group.get("lr") for group in trainer.optimizer.param_groups]
        with _undone_unless_whole(source, trainer):
            trainer.optimizer.load_state_dict(optimizer)
            if trainer.lr_scheduler is not None:
                trainer.lr_scheduler.load_state_dict(scheduler)
            restore_position(trainer, rank)
            trainer.load_state_dict(own)  # last, since it drops the gradients that wait for an update
        trainer.broken_off = f"the loading of {source} was broken off"
        with torch.no_grad():
            for name, tensor in _trained(trainer.model).items():
                tensor.copy_(weights[name])
        trainer.broken_off = None
        # Whatever is logged next belongs behind the checkpoint's steps. From here on another branch of the run may be
        # made from a copy of the same checkpoint: they are told apart.
        trainer.run_log.go_on(trainer.current_step, (*state.get("earlier_runs", ()), state.get("run")))
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
        source = files.existing(files.resolved(directory))
    except FileNotFoundError:
        return None
    state = files.read_state(source)
    with files.named_if_damaged(source):
        return restored(state["trainer"], {})["current_step"]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once, by its first name; tied weights share one entry."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return parameters | stored_buffers(model)


def _write_shared(trainer: Trainer, draft: Path) -> None:
    optimizer_tensors: dict[str, Tensor] = {}
    scheduler = None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()
    state = {
        "format": files.FORMAT,
        "world_size": trainer.world.size,
        "frozen": frozen_digest(trainer),
        "frozen_buffers": frozen_buffers(trainer),
        "config": _configuration(trainer),
        "optimizer": plain(trainer.optimizer.state_dict(), "optimizer", optimizer_tensors),
        "optimizer_made_of": optimizer_made_of(trainer),
        "lr_scheduler": None if scheduler is None else plain(scheduler, "lr_scheduler"),
        "scheduler_class": scheduler_class(trainer.lr_scheduler),
        "trainer": plain(trainer.state_dict(), "trainer"),
        "run": trainer.run_log.run_name,
        "earlier_runs": trainer.run_log.earlier_runs,
    }
    files.write_tensors(draft / files.POLICY, _trained(trainer.model))
    files.write_tensors(draft / files.OPTIMIZER, optimizer_tensors)
    files.write_json(draft / files.STATE, state)


@contextmanager
def _undone_unless_whole(source: Path, trainer: Trainer) -> Iterator[None]:
    """Put back what was taken over, where the rest cannot be. The weights, which always fit, come afterwards."""
    scheduler = trainer.lr_scheduler
    optimizer, own, place = trainer.optimizer.state_dict(), trainer.state_dict(), position(trainer)
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
        restore_position(trainer, place)
        if isinstance(error, _MISFITS):
            raise ValueError(
                f"{source} does not fit this trainer: {type(error).__name__}: {error}; make the optimizer and the "
                "lr_scheduler as they were made then. Nothing has changed"
            ) from error
        raise


def _configuration(trainer: Trainer) -> dict[str, Any]:
    return {name: value for name, value in plain_settings(trainer.config).items() if name not in _INDIFFERENT}
