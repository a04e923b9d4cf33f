"""What a checkpoint holds: written, and read again with everything checked before anything of a trainer changes."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ppo_runtime.common.redact import plain_settings
from ppo_runtime.common.trees import copied, plain
from ppo_runtime.learning.controllers import AdaptiveKLController
from ppo_runtime.ranks.gather import as_bytes
from ppo_runtime.ranks.shards import is_shard, moments_in_parts
from ppo_runtime.resuming import files, parts, reading, sealing
from ppo_runtime.resuming.fitting import (
    AS_THEN,
    check_controller_state,
    check_finite,
    check_optimizer_made,
    check_scheduler_state,
    check_tensors,
    optimizer_made_of,
    scheduler_class,
)
from ppo_runtime.resuming.frozen import check_frozen, frozen_buffers, frozen_digest, stored_buffers
from ppo_runtime.resuming.making import check_computed, computed, made_with
from ppo_runtime.resuming.position import check_data, check_world, position_here, rank_state, source_of
from ppo_runtime.resuming.records import OptimizerRecord, StateRecord
from ppo_runtime.resuming.sealing import NUMBERS, Manifest, Seal
from ppo_runtime.resuming.stepping import check_shapes, check_steps
from ppo_runtime.trainer import Trainer

# Where a run's files go has no influence on its numbers.
_INDIFFERENT = frozenset(
    {"exp_name", "log_with", "tracker_kwargs", "project_kwargs", "tracker_project_name", "steps", "accel_strict"}
    | {"ranks_timeout"}
)
_POLICY = "policy."
"""What weights' names begin with in parts, where moments are beside them."""


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
    look = partial(sealing.check_sealed, source, manifest)
    in_parts = [] if manifest is None else manifest.parts
    if manifest is None:
        look()
    else:
        # Each rank looks at all that it reads, which may be a copy of its own, and at its share of the others.
        count, share = len(in_parts), slice(world.rank, None, world.size)
        seen = in_parts[world.rank * count // world.size : (world.rank + 1) * count // world.size]
        tensors = seen if in_parts else manifest.tensors
        ranks = {source_of(world, manifest.ranks), *range(manifest.ranks)[share]}
        look([files.STATE, *tensors, *map(files.rank_file, sorted(ranks))])
    state = reading.read_state(source, manifest)
    if in_parts:
        weights, moments = _divided(parts.outline(source, in_parts))
    else:
        weights, moments = (files.read_tensors(source / name) for name in (files.POLICY, files.OPTIMIZER))
    check_tensors(source, weights, trained(trainer.model))
    optimizer = reading.read_tree(source, state, state.optimizer, "optimizer", moments)
    reading.read_record(source, OptimizerRecord, optimizer, "optimizer")
    scheduler = reading.read_tree(source, state, state.lr_scheduler, "lr_scheduler")
    own = reading.read_trainer(source, state)
    there = source_of(world, state.world_size)
    held = reading.read_rank(source, state, there)
    check_world(source, state.config, state.world_size, trainer)
    check_frozen(source, state, trainer)
    check_scheduler_state(source, state, scheduler, trainer.lr_scheduler)
    check_optimizer_made(source, state.optimizer_made_of, optimizer, trainer)
    check_controller_state(source, own, trainer)
    check_computed(source, state.computes, trainer)
    check_data(source, held, trainer)
    if in_parts:
        check_shapes(source, optimizer, trainer.optimizer, AS_THEN)  # before they take memory
        outlines, likes = _joined(weights, moments), _likes(trainer, moments)
        weights, moments = _divided(
            parts.read(source, in_parts, lambda needed: look(sorted(needed.difference(seen))), outlines, likes)
        )
        optimizer = reading.read_tree(source, state, state.optimizer, "optimizer", moments)
    check_steps(source, optimizer, trainer.optimizer, AS_THEN)
    if not in_parts:
        # What was read is the file's until it is copied, those rows of it that are needed.
        optimizer = copied(moments_in_parts(optimizer, trainer.optimizer))
    check_finite(source, weights, trainer.model)
    return Found(
        weights=weights,
        optimizer=optimizer,
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


def held(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """The weights that train, the optimiser's moments and what else it holds; some tensors may be in parts."""
    moments: dict[str, Tensor] = {}
    optimizer = plain(trainer.optimizer.state_dict(), "optimizer", moments)
    return trained(trainer.model), moments, optimizer


def write_parts(trainer: Trainer, draft: Path) -> int:
    """The tensors, where models are divided, by all ranks together; gives into how many files of each."""
    weights, moments, _ = held(trainer)
    return parts.write(_joined(weights, moments), draft, trainer.world)


def undivided(trainer: Trainer) -> dict[str, str]:
    """Digests of those moments that ranks hold whole, which one of them writes for all."""
    _, moments, _ = held(trainer)
    return {
        name: f"{tuple(x.shape)} {hashlib.sha256(as_bytes(x).numpy().data).hexdigest()[:16]}"
        for name, x in moments.items()
        if not is_shard(x)
    }


def write_own(trainer: Trainer, draft: Path, count: int) -> list[Seal]:
    """What every process writes for itself; gives the seals of that and of its parts, in so many files."""
    own, *others = files.own_files(trainer.world.rank, count)
    files.write_json(draft / own, plain(rank_state(trainer), own.removesuffix(".json")))
    return [Seal.of(draft / name) if (draft / name).exists() else sealing.NOTHING for name in (own, *others)]


def write_shared(trainer: Trainer, draft: Path) -> dict[str, Seal]:
    """What one process writes for all: without tensors, where models are divided."""
    weights, moments, optimizer = held(trainer)
    sharded = trainer.parallel.sharded
    scheduler = None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict()
    state = {
        "format": files.IN_PARTS if sharded else files.FORMAT,
        "world_size": trainer.world.size,
        "frozen": frozen_digest(trainer),
        "frozen_buffers": frozen_buffers(trainer),
        "config": configuration(trainer),
        "optimizer": optimizer,
        "optimizer_made_of": optimizer_made_of(trainer),
        "lr_scheduler": None if scheduler is None else plain(scheduler, "lr_scheduler"),
        "scheduler_class": scheduler_class(trainer.lr_scheduler),
        "trainer": plain(trainer.state_dict(), "trainer"),
        "run": trainer.run_log.run_name,
        "earlier_runs": trainer.run_log.earlier_runs,
        "computes": computed(trainer),
        "made_with": made_with(trainer),
    }
    tensors = {} if sharded else {files.POLICY: weights, files.OPTIMIZER: moments}
    for name, of_it in tensors.items():
        files.write_tensors(draft / name, of_it)
    files.write_json(draft / files.STATE, state)
    return {name: Seal.of(draft / name) for name in (*tensors, files.STATE)}


def told_of(trainer: Trainer, seals: list[Seal]) -> Tensor:
    """What a rank tells the others of its scores and of its files, in numbers."""
    recent = trainer.recent_scores
    numbers = [number for seal in seals for number in sealing.as_numbers(seal)]
    return torch.tensor([recent.sum, recent.count, *numbers], dtype=torch.float64)


def manifest_of(shared: dict[str, Seal], told: Tensor) -> Manifest:
    """Of the files of all ranks, [ranks, 2 + NUMBERS * files]: what each tells of its own."""
    found = dict(shared)
    for rank, row in enumerate(told[:, 2:].reshape(len(told), -1, NUMBERS)):
        seals = map(sealing.from_numbers, row)
        own = zip(files.own_files(rank, len(row) - 1), seals, strict=True)
        found |= {name: seal for name, seal in own if seal != sealing.NOTHING}
    total, count = told[:, :2].sum(0).tolist()
    return Manifest(found, total / count if count else None)


def _joined(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and moments by the names that they have in parts: those of moments begin with "optimizer."."""
    return {f"{_POLICY}{name}": x for name, x in weights.items()} | dict(moments)


def _divided(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What :func:`_joined` was given."""
    weights = {name.removeprefix(_POLICY): x for name, x in tensors.items() if name.startswith(_POLICY)}
    return weights, {name: x for name, x in tensors.items() if not name.startswith(_POLICY)}


def _likes(trainer: Trainer, moments: Iterable[str]) -> dict[str, Tensor]:
    """What of a trainer is divided as a tensor of that name shall be: a moment as its parameter."""
    parameters = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
    known = {f"optimizer.state.{place}": parameter for place, parameter in enumerate(parameters)}
    theirs = {name: known[place] for name in moments if (place := ".".join(name.split(".")[:3])) in known}
    return _joined(trained(trainer.model), theirs)


def configuration(trainer: Trainer) -> dict[str, Any]:
    """The settings that have an influence on a run's numbers, as they are in force, without secrets."""
    controller = trainer.kl_ctl
    steered = ("target", "horizon") if isinstance(controller, AdaptiveKLController) else ()  # which can be set
    settings = plain_settings(trainer.config) | {name: getattr(controller, name) for name in steered}
    return {name: value for name, value in settings.items() if name not in _INDIFFERENT}
