"""Whether a trainer's state can be kept in a checkpoint, and whether a run could go on from it."""

import math

from torch import Tensor

from ppo_runtime.common.trees import plain
from ppo_runtime.learning.optimisers import check_fits, check_kind_of_scheduler
from ppo_runtime.ranks.shards import here
from ppo_runtime.trainer import Trainer


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
