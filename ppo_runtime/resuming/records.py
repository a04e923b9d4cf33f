"""What the records of a checkpoint may hold: every field is checked before a trainer takes anything over."""

import random
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from ppo_runtime.common.setting_kinds import NOT_NEGATIVE, boolean, natural, number, positive_integer
from ppo_runtime.config import PPOConfig
from ppo_runtime.resuming.fields import (
    ADDED,
    FINITE,
    LARGEST,
    by_name,
    every,
    is_digest,
    is_finite,
    is_text,
    is_whole,
    maybe,
    record,
    that,
)

_LOOKED_AT = {"batch_size", "init_kl_coef", "learning_rate", "seed"}


def _made_of(value: Any) -> bool:
    return set(value) == {"class", "groups"} and is_text(value["class"]) and every(every(is_text))(value["groups"])


def _tree(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"dict"}


def _settings(value: Any) -> bool:
    """Whether they are settings by name, and those that loading looks at could be a trainer's."""
    known = attrs.fields_dict(PPOConfig)
    for name in _LOOKED_AT & value.keys():
        check: Any = known[name].validator
        check(None, known[name], value[name])
    return by_name(lambda _: True)(value)


@attrs.frozen(kw_only=True)
class StateRecord:
    """``state.json``. Fields with a default are missing from checkpoints of before."""

    format: int = attrs.field(validator=that("1, 2 or 3", lambda value: is_whole(value, 1, 4)))
    world_size: int = attrs.field(validator=that("a number of processes", lambda value: is_whole(value, 1, 2**31)))
    frozen: str = attrs.field(validator=that("a SHA-256", is_digest))
    frozen_buffers: Mapping[str, str] | None = attrs.field(
        validator=that("a SHA-256 for each name", maybe(by_name(is_digest))), default=None
    )
    config: Mapping[str, Any] = attrs.field(validator=that("settings by name", _settings))
    optimizer: Any = attrs.field(validator=that("an optimizer's state", _tree))
    optimizer_made_of: Mapping[str, Any] | None = attrs.field(
        validator=that("a class and names of parameters", maybe(_made_of)), default=None
    )
    lr_scheduler: Any = attrs.field(validator=that("a scheduler's state or nothing", maybe(_tree)))
    scheduler_class: str | None = attrs.field(
        validator=that("the name of a class or nothing", maybe(is_text)), default=None
    )
    trainer: Any = attrs.field(validator=that("the trainer's state", _tree))
    run: str | None = attrs.field(validator=that("a name or nothing", maybe(is_text)), default=None)
    earlier_runs: tuple[str | None, ...] = attrs.field(
        validator=that("a list of names", every(maybe(is_text))), default=()
    )
    computes: Mapping[str, Mapping[str, Any]] | None = attrs.field(
        validator=that("facts by names of each model", maybe(by_name(by_name(lambda _: True)))),
        default=None,
        metadata={ADDED: True},
    )
    made_with: Mapping[str, Mapping[str, str]] | None = attrs.field(
        validator=that("texts by names of each part", maybe(by_name(by_name(is_text)))),
        default=None,
        metadata={ADDED: True},
    )


def _groups(value: Any) -> bool:
    return bool(value) and all(isinstance(group, dict) and every(is_whole)(group["params"]) for group in value)


@attrs.frozen(kw_only=True)
class OptimizerRecord:
    """What an optimiser's ``state_dict`` gives, of whatever kind it is."""

    state: Mapping[Any, Any] = attrs.field(
        validator=that("states of parameters", lambda value: isinstance(value, Mapping))
    )
    param_groups: list[dict[str, Any]] = attrs.field(validator=that("groups of parameters", _groups))


@attrs.frozen(kw_only=True)
class ScoreRecord:
    """The running moments of the scores."""

    count: float = attrs.field(validator=number(0, 2**53, low_open=False))
    mean: float = attrs.field(validator=FINITE)
    m2: float = attrs.field(validator=NOT_NEGATIVE)


def _plain_number(value: Any) -> Any:
    """Of a tensor of one entry, as a controller of the user's own may have."""
    return value.item() if isinstance(value, Tensor) and not value.ndim else value


@attrs.frozen(kw_only=True)
class TrainerRecord:
    """What ``Trainer.state_dict`` gives."""

    current_step: int = attrs.field(validator=that("a number of steps", is_whole))
    kl_coef: Any = attrs.field(validator=that("a finite number", lambda value: is_finite(_plain_number(value))))
    best_score: float | None = attrs.field(validator=number(-LARGEST, LARGEST, low_open=False, optional=True))
    scores: Any = attrs.field(
        validator=that("the moments of scores", lambda value: bool(record(ScoreRecord, value, "scores")))
    )
    unscheduled: bool = attrs.field(validator=boolean, default=False)


def _generator_of_python(value: Any) -> bool:
    random.Random().setstate(value)
    _, _, gauss = value
    return gauss is None or is_finite(gauss)


def _generator_of_numpy(value: Any) -> bool:
    name, keys, place, has_gauss, gauss = value
    # numpy would read beyond its keys for any other place.
    fine = name == "MT19937" and keys.dtype == np.uint32 and keys.shape == (624,) and is_whole(place, 0, 625)
    fine = fine and is_whole(has_gauss, 0, 2) and is_finite(gauss)
    np.random.RandomState().set_state(value)
    return fine


def _generator_of_torch(value: Any) -> bool:
    torch.Generator().set_state(value)
    return True


def _bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.uint8 and value.ndim == 1


@attrs.frozen(kw_only=True)
class RankRecord:
    """``rank-<n>.json``: what a process has for itself."""

    python: Any = attrs.field(validator=that("a state of Python's generator", _generator_of_python))
    numpy: Any = attrs.field(validator=that("a state of numpy's generator", _generator_of_numpy))
    torch: Tensor = attrs.field(validator=that("a state of torch's generator", _generator_of_torch))
    shuffle: Tensor = attrs.field(validator=that("a state of torch's generator", _generator_of_torch))
    cuda: Any = attrs.field(validator=that("states of CUDA's generators or nothing", maybe(every(_bytes))))
    cuda_device: int | None = attrs.field(validator=that("a device's number or nothing", maybe(is_whole)), default=None)
    device: Any = attrs.field(
        validator=that(
            "a device and its generator's state, or nothing",
            maybe(lambda value: len(value) == 2 and is_text(value[0]) and _bytes(value[1])),
        ),
        default=None,
    )
    data: Any = attrs.field(
        validator=that("a place in the data or nothing", maybe(lambda value: bool(record(_kind(value), value, "data"))))
    )
    prompts: str | None = attrs.field(validator=that("a SHA-256 or nothing", maybe(is_digest)), default=None)
    all_prompts: str | None = attrs.field(
        validator=that("a SHA-256 or nothing", maybe(is_digest)), default=None, metadata={ADDED: True}
    )


@attrs.frozen(kw_only=True)
class PlaceRecord:
    """A place in the data, which is the same on all ranks."""

    epoch: int = attrs.field(validator=that("the number of an epoch, from -1", lambda value: is_whole(value, -1)))
    seen: int = attrs.field(validator=natural)
    rows: int = attrs.field(validator=positive_integer)
    batch_size: int = attrs.field(validator=positive_integer)
    ranks: int = attrs.field(validator=positive_integer)
    seed: int = attrs.field(validator=natural)

    def __attrs_post_init__(self) -> None:
        """Check what takes two fields to check."""
        if self.epoch < 0 < self.seen:
            raise ValueError(f"seen is {self.seen}, expected 0 before the first epoch")
        if self.seen > self.rows:
            raise ValueError(f"seen is {self.seen}, expected at most rows = {self.rows}")


@attrs.frozen(kw_only=True)
class OldPlaceRecord:
    """A place in the data as format 1 has it: in batches of one rank."""

    epoch: int = attrs.field(validator=that("the number of an epoch, from -1", lambda value: is_whole(value, -1)))
    consumed: int = attrs.field(validator=natural)
    rows: int | None = attrs.field(validator=attrs.validators.optional(positive_integer), default=None)
    batch_size: int | None = attrs.field(validator=attrs.validators.optional(positive_integer), default=None)


def _kind(value: Mapping[str, Any]) -> type:
    return OldPlaceRecord if "consumed" in value else PlaceRecord
