"""What a checkpoint holds: written, and read again with everything checked before anything of a trainer changes."""

from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from ppo_runtime.common.redact import plain_settings
from ppo_runtime.common.trees import copied, plain
from ppo_runtime.ranks.presence import lost_ranks_named
from ppo_runtime.ranks.shards import on_first
from ppo_runtime.resuming import files, reading, sealing
from ppo_runtime.resuming.fitting import (
    check_controller_state,
    check_finite,
    check_optimizer_state,
    check_scheduler_state,
    check_tensors,
    optimizer_made_of,
    scheduler_class,
)
from ppo_runtime.resuming.frozen import check_frozen, frozen_buffers, frozen_digest, stored_buffers
from ppo_runtime.resuming.position import check_data, check_world, position_here, rank_state, source_of
from ppo_runtime.resuming.records import OptimizerRecord, StateRecord
from ppo_runtime.resuming.sealing import NUMBERS, Manifest, Seal
from ppo_runtime.trainer import Trainer

# Where a run's files go has no influence on its numbers.
_INDIFFERENT = frozenset(
    {"exp_name", "log_with", "tracker_kwargs", "project_kwargs", "tracker_project_name", "steps", "accel_strict"}
    | {"ranks_timeout"}
)


@attrs.frozen(eq=False)
class Found:
    """What a checkpoint holds for a process, checked."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: Any
    own: dict[str, Any]
    position: dict[str, Any]
    state: StateRecord
    score: float | None
    stamp: str
    """A digest, which tells ranks that they have read the same."""


def read(source: Path, trainer: Trainer) -> Found:
    """Read and check everything, before anything of the trainer changes."""
    world, manifest = trainer.world, sealing.read_manifest(source)
    shared = files.STATE, files.POLICY, files.OPTIMIZER
    if manifest is None:
        sealing.check_sealed(source, None)
    else:
        own_file = files.rank_file(source_of(world, manifest.ranks))
        sealing.check_sealed(source, manifest, [*shared, own_file])
    state = reading.read_state(source, manifest)
    weights = files.read_tensors(source / files.POLICY)
    check_tensors(source, weights, trained(trainer.model))
    moments = files.read_tensors(source / files.OPTIMIZER)
    optimizer = reading.read_tree(source, state, state.optimizer, "optimizer", moments)
    reading.read_record(source, OptimizerRecord, optimizer, "optimizer")
    scheduler = reading.read_tree(source, state, state.lr_scheduler, "lr_scheduler")
    own = reading.read_trainer(source, state)
    there = source_of(world, state.world_size)
    held = reading.read_rank(source, state, there)
    check_world(source, state.config, state.world_size, trainer)
    check_frozen(source, state, trainer)
    check_scheduler_state(source, state, scheduler, trainer.lr_scheduler)
    check_optimizer_state(source, state.optimizer_made_of, optimizer, trainer)
    check_controller_state(source, own, trainer)
    check_data(source, held, trainer)
    check_finite(source, weights, trainer.model)
    return Found(
        weights=weights,
        # Copies of its own: what was read is the file's until then.
        optimizer=copied(optimizer),
        scheduler=scheduler,
        own=own,
        position=position_here(held, world, state.world_size, Seal.of(source / files.rank_file(there)).sha256),
        state=state,
        score=None if manifest is None else manifest.score,
        stamp=Seal.of(source / (files.STATE if manifest is None else files.MANIFEST)).sha256,
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes, each once, by its first name; tied weights share one entry."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return parameters | stored_buffers(model)


def write_own(trainer: Trainer, draft: Path) -> Seal:
    """What every process writes for itself."""
    name = files.rank_file(trainer.world.rank)
    files.write_json(draft / name, plain(rank_state(trainer), name.removesuffix(".json")))
    return Seal.of(draft / name)


def gathered(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and the optimiser's state, whole, for the rank that writes them; a collective where they are in parts."""
    held = trained(trainer.model), trainer.optimizer.state_dict()
    if not trainer.parallel.sharded:
        return held
    with lost_ranks_named(trainer.world, "the gathering of what a checkpoint holds"):
        frozen_digest(trainer)  # rank 0 alone asks for it again
        return on_first(held, trainer.world.rank)


def write_shared(
    trainer: Trainer, draft: Path, weights: dict[str, Tensor], optimizer: dict[str, Any]
) -> dict[str, Seal]:
    """What one process writes for all; weights and the optimiser's state are whole."""
    optimizer_tensors: dict[str, Tensor] = {}
    scheduler = None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()
    state = {
        "format": files.FORMAT,
        "world_size": trainer.world.size,
        "frozen": frozen_digest(trainer),
        "frozen_buffers": frozen_buffers(trainer),
        "config": configuration(trainer),
        "optimizer": plain(optimizer, "optimizer", optimizer_tensors),
        "optimizer_made_of": optimizer_made_of(trainer),
        "lr_scheduler": None if scheduler is None else plain(scheduler, "lr_scheduler"),
        "scheduler_class": scheduler_class(trainer.lr_scheduler),
        "trainer": plain(trainer.state_dict(), "trainer"),
        "run": trainer.run_log.run_name,
        "earlier_runs": trainer.run_log.earlier_runs,
    }
    files.write_tensors(draft / files.POLICY, weights)
    files.write_tensors(draft / files.OPTIMIZER, optimizer_tensors)
    files.write_json(draft / files.STATE, state)
    return {name: Seal.of(draft / name) for name in (files.POLICY, files.OPTIMIZER, files.STATE)}


def manifest_of(shared: dict[str, Seal], told: Tensor) -> Manifest:
    """Of the files of all ranks, [ranks, NUMBERS + 2]: what each says of its own, and of its scores."""
    own = {files.rank_file(rank): sealing.from_numbers(row[:NUMBERS]) for rank, row in enumerate(told)}
    total, count = told[:, NUMBERS:].sum(0).tolist()
    return Manifest(shared | own, total / count if count else None)


def configuration(trainer: Trainer) -> dict[str, Any]:
    """The settings that have an influence on a run's numbers, without secrets."""
    return {name: value for name, value in plain_settings(trainer.config).items() if name not in _INDIFFERENT}
