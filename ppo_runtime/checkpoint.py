"""Checkpoints from which training goes on bit for bit: tensors in safetensors, everything else in JSON, no pickle.

A checkpoint is a directory: ``policy.safetensors`` (the parameters that train, and buffers), ``optimizer.safetensors``,
``state.json`` (counters, controller, scheduler, configuration), one ``rank-<n>.json`` for the random generators and the
place in the data of each process, and ``manifest.json``, by which a file that was cut, changed or taken from another
save is found before anything is loaded. What never changes, the reference above all, is not stored; a digest of it is,
so that a checkpoint is not continued against another reference.

Where models are divided among ranks, each writes its rows of weights and moments, as torch's distributed checkpoints
are: ``shard-*.safetensors`` in place of the first two. Any number of ranks goes on from either kind, divided or not.

A run keeps several, as ``checkpoint-<step>`` in its directory: ``save_in`` makes one and removes older ones,
``newest_good`` finds the one to go on from.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppo_runtime.common.files import is_working_directory, siblings, sync
from ppo_runtime.common.trees import copied
from ppo_runtime.ranks.agreement import all_or_none
from ppo_runtime.ranks.shards import fill
from ppo_runtime.resuming import contents, files, rotation, sealing
from ppo_runtime.resuming.files import check_replaceable
from ppo_runtime.resuming.fitting import settle_differences
from ppo_runtime.resuming.frozen import know_frozen
from ppo_runtime.resuming.keeping import check_worth_keeping
from ppo_runtime.resuming.position import position, restore_position
from ppo_runtime.resuming.reading import steps_done
from ppo_runtime.resuming.rotation import newest_good
from ppo_runtime.resuming.sealing import NUMBERS
from ppo_runtime.resuming.stepping import with_present_implementation
from ppo_runtime.trainer import Trainer

__all__ = ["load_checkpoint", "newest_good", "save_checkpoint", "save_in", "steps_done"]

_MISFITS = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)


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
        OSError: the directory cannot be made, filled or replaced. What is there is kept.
        RuntimeError: another rank could not write its part.
    """
    target, world, made = files.resolved(directory), trainer.world, Path(directory).absolute()
    stands_in_it = is_working_directory(target)
    with all_or_none(world, phase="the making of a checkpoint's directory"):
        check_replaceable(target)
        check_worth_keeping(trainer)
        draft, previous = siblings(target)
        if world.rank == 0:
            with files.told(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
    try:
        count, shared = 0, {}
        if trainer.parallel.sharded:
            know_frozen(trainer)
            with all_or_none(world, phase="the search for a checkpoint's directory") as ballot, files.told(target):
                draft.stat()  # on a disk that isn't shared, torch would make one
                ballot.facts = lambda: contents.undivided(trainer)
                ballot.advice = (
                    "expected the same on all ranks, or parts of one tensor (torch's DTensor): one rank's would be "
                    "kept for all; make them like their parameter, or set parallelism='ddp'"
                )
            with all_or_none(world, phase="the writing of all ranks' parts"), files.told(target):
                count = contents.write_parts(trainer, draft)
        with all_or_none(world, carries=2 + NUMBERS * (1 + count), phase="the writing of a checkpoint") as ballot:
            with files.told(target):
                own = contents.write_own(trainer, draft, count)
                if world.rank == 0:
                    shared = contents.write_shared(trainer, draft)
            ballot.mine[:] = contents.told_of(trainer, own)
        with all_or_none(world, phase="the renaming of a checkpoint"):  # nobody goes on before it is in place
            if world.rank == 0:
                with files.told(target):
                    manifest = contents.manifest_of(shared, ballot.all)
                    sealing.check_there(draft, manifest)
                    sealing.write_manifest(draft, manifest)
                    files.put_in_place(draft, target, previous)
                sync(target.parent)
                shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    trainer.recent_scores.kept()
    if stands_in_it:
        os.chdir(target)  # the working directory was replaced: without this the process would stand in a removed one
    return made


def save_in(output_dir: str | Path, trainer: Trainer, *, keep_last: int = 2, keep_best: bool = False) -> Path:
    """Make ``<output_dir>/checkpoint-<step>``, and remove those that are no longer wanted; call it on every rank.

    What saves that were killed have left is removed as well, but never the only checkpoint. One that is damaged is
    neither counted nor removed: :func:`newest_good` says what is wrong with it. Those of this and of later steps, left
    by a run that has gone back to an earlier one, are renamed to ``checkpoint-<step>.abandoned``.

    Args:
        output_dir: of the run.
        trainer: after any number of steps.
        keep_last: how many to keep, those of the latest steps, the new one among them.
        keep_best: keep the one of the best steps besides: that with the highest mean raw score of all sequences since
            the checkpoint before, over all ranks.

    Returns:
        The checkpoint made.

    Raises:
        ValueError: ``keep_last`` is no number from 1; and what :func:`save_checkpoint` raises.
    """
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
        raise ValueError(f"keep_last is {keep_last!r:.60}, expected an integer of at least 1")
    output = Path(output_dir)
    place = output / rotation.name_after(trainer.current_step)
    with all_or_none(trainer.world, phase="the clearing away of old checkpoints"):
        if trainer.world.rank == 0:
            rotation.clean(output)
            if trainer.current_step > trainer.run_log.begins_after:
                rotation.make_room(place, trainer.run_log.run_name)
    made = save_checkpoint(trainer, place)
    with all_or_none(trainer.world, phase="the clearing away of old checkpoints"):
        if trainer.world.rank == 0:
            rotation.set_aside(output, made)
            rotation.prune(output, made, keep_last=keep_last, keep_best=keep_best)
    return made


def load_checkpoint(trainer: Trainer, directory: str | Path | None) -> None:
    """Bring a freshly made trainer to where ``save_checkpoint`` was called.

    Make it from the same original model, reference, dataset and kind of optimiser and scheduler; the reference is the
    policy as it was *before* training, so do not start from the trained weights. Call it on every rank.

    Settings may differ, those of generation among them, and what a step calls: all are named in a warning with what is
    in force then, and the continuation is not the one that would have been. Another ``learning_rate`` holds from here
    on, unless a scheduler goes on from the checkpoint's; another ``init_kl_coef`` is what the controller goes on from;
    generators and the order of the data are the checkpoint's.

    The number of ranks may differ as long as ``batch_size`` times ranks, the sequences of a step, is the same: the
    order of the prompts, policy, optimiser, scheduler and controller go on as they would have, and updates on whole
    batches are the same within float32. Which rank has which rows is another, and so is what is sampled for them.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, belongs to another model, reference, dataset, optimiser, scheduler or number of
            sequences in a step, or was made by a later version. The trainer is unchanged then.
        RuntimeError: another rank could not load it.
    """
    world = trainer.world
    if trainer.parallel.sharded:
        know_frozen(trainer)  # before one rank can refuse what it reads
    with all_or_none(world, phase="the reading of a checkpoint") as ballot:
        if directory is None:  # as newest_good says where there is none
            raise FileNotFoundError(
                "directory is None, expected that of a checkpoint: newest_good has found none, so there is nothing to "
                "go on from; begin without load_checkpoint"
            )
        source = files.existing(files.resolved(directory))
        found = contents.read(source, trainer)
        ballot.facts = lambda: {f"what is in {directory}": found.stamp}
        ballot.advice = "give all ranks the same files"
    groups = [dict(group) for group in trainer.optimizer.param_groups]
    schedule = None if trainer.lr_scheduler is None else copied(trainer.lr_scheduler.state_dict())
    with _undone_unless_whole(trainer), all_or_none(world, phase="the loading of a checkpoint"), _named_misfits(source):
        trainer.optimizer.load_state_dict(with_present_implementation(found.optimizer, groups))
        if trainer.lr_scheduler is not None:
            trainer.lr_scheduler.load_state_dict(found.scheduler)
        restore_position(trainer, found.position)
        trainer.load_state_dict(found.own)  # last, since it drops the gradients that wait for an update
    trainer.broken_off = f"the loading of {source} was broken off"
    for name, tensor in contents.trained(trainer.model).items():
        fill(tensor, found.weights[name])
    trainer.broken_off = None
    trainer.recent_scores.resumed(found.score)
    # Whatever is logged next belongs behind the checkpoint's steps. From here on another branch of the run may be
    # made from a copy of the same checkpoint: they are told apart.
    trainer.run_log.go_on(trainer.current_step, (*found.state.earlier_runs, found.state.run))
    settle_differences(found.state, contents.configuration(trainer), trainer, groups, schedule)


@contextmanager
def _undone_unless_whole(trainer: Trainer) -> Iterator[None]:
    """Put back what was taken over, where the rest cannot be. The weights, which always fit, come afterwards."""
    scheduler = trainer.lr_scheduler
    optimizer, own, place = trainer.optimizer.state_dict(), trainer.state_dict(), position(trainer)
    broken_off = trainer.broken_off
    scheduled = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
    try:
        yield
    except BaseException:
        trainer.optimizer.load_state_dict(optimizer)
        if scheduler is not None:
            scheduler.load_state_dict(scheduled)
        if trainer.state_dict() != own:
            trainer.load_state_dict(own)
        trainer.broken_off = broken_off
        restore_position(trainer, place)
        raise


@contextmanager
def _named_misfits(source: Path) -> Iterator[None]:
    """Say of what a part of the user's own does not take which checkpoint it is, and what to do."""
    try:
        yield
    except _MISFITS as error:
        raise ValueError(
            f"{source} does not fit this trainer: {type(error).__name__}: {error}; make the optimizer and the "
            "lr_scheduler as they were made then. Nothing has changed"
        ) from error
