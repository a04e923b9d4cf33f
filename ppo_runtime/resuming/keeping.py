"""Whether a trainer's state can be kept in a checkpoint, and whether a run could go on from it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ppo_runtime.common.trees import plain, read_back
from ppo_runtime.learning.optimisers import check_fits, check_kind_of_scheduler
from ppo_runtime.ranks.shards import here
from ppo_runtime.resuming.fields import record
from ppo_runtime.resuming.files import STATE, Damaged, text_of
from ppo_runtime.resuming.records import OptimizerRecord, TrainerRecord
from ppo_runtime.resuming.stepping import check_steps
from ppo_runtime.trainer import Trainer


def check_storable(trainer: Trainer) -> None:
    """Refuse an optimiser, a scheduler or a state of the trainer's that no checkpoint could hold, or be loaded with.

    Raises:
        TypeError: it is none of what JSON and tensors can express, by its place.
        ValueError: it is something that is refused where a checkpoint is read.
    """
    scheduler = trainer.lr_scheduler
    try:
        if scheduler is not None:
            check_kind_of_scheduler(scheduler)
            _read_again(scheduler.state_dict(), "lr_scheduler")
        optimizer = _read_again(trainer.optimizer.state_dict(), "optimizer", {})
        record(OptimizerRecord, optimizer, "optimizer")
        check_steps(Path("it"), optimizer, trainer.optimizer, "make another optimizer")
        record(TrainerRecord, _read_again(trainer.state_dict(), "trainer"), "trainer")
    except ValueError as error:
        what = error.what if isinstance(error, Damaged) else error
        raise ValueError(f"no checkpoint is made, since none of this trainer could be loaded: {what}") from error


def _read_again(state: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A state as it is read from a checkpoint that holds it."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{where}.state_dict() gives a {type(state).__name__}, expected a dictionary")
    text = text_of(STATE, {where: plain(state, where, tensors)})
    return read_back(json.loads(text)[where], where, tensors)


def check_worth_keeping(trainer: Trainer) -> None:
    """Refuse what no run could go on from.

    Raises:
        ValueError: the last step was broken off, the KL coefficient, weights or moments are not finite, or the latter
            do not fit together.
    """
    if trainer.broken_off is not None:
        raise ValueError(
            f"{trainer.broken_off}, and so the weights are between two steps: no checkpoint is made of them; make one "
            "after the next whole step, or load the last one"
        )
    if trainer.lr_scheduler is not None:
        check_kind_of_scheduler(trainer.lr_scheduler)
    if not math.isfinite(trainer.kl_ctl.value):
        raise ValueError(
            f"kl_ctl.value is {trainer.kl_ctl.value}, expected a finite number: no run could go on from it, and no "
            "checkpoint is made; set trainer.kl_ctl.value"
        )
    check_fits(trainer.optimizer, trainer.model)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    moments: dict[str, Tensor] = {}
    plain(trainer.optimizer.state_dict(), "optimizer", moments)
    for name, tensor in (weights | moments).items():
        if tensor.is_floating_point() and not bool(here(tensor).isfinite().all()):
            lower = "lower learning_rate" if trainer.lr_scheduler is None else "lower the scheduler's learning rates"
            raise ValueError(
                f"{name} holds numbers that are not finite: no checkpoint is made of them; load the last one, and "
                f"{lower} or set max_grad_norm"
            )
    check_storable(trainer)
