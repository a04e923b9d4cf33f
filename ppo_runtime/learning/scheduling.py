"""A learning-rate scheduler's step, made whole or not at all."""

from typing import Any

import torch
from torch import Tensor

from ppo_runtime.common.trees import copied


def advance(scheduler: Any, optimizer: torch.optim.Optimizer) -> Exception | None:
    """Step a scheduler; where that fails, it and the optimiser's rates stay as they are.

    Many schedulers raise behind their last step, with a counter that has moved already.

    Returns:
        Why there is no next learning rate; None if there is.
    """
    try:
        state = copied(scheduler.state_dict())
        groups = [copied(_options(group)) for group in optimizer.param_groups]
    except Exception as error:  # the user's own may raise anything
        return error
    try:
        scheduler.step()
    except BaseException as error:
        scheduler.load_state_dict(state)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            _put_back(group, before)
        if isinstance(error, Exception):
            return error
        raise
    return None


def no_rate(scheduler: Any, step: int, error: Exception) -> str:
    """The message about a scheduler without a learning rate for a step."""
    return (
        f"lr_scheduler is a {type(scheduler).__name__}, which has no learning rate for step {step} "
        f"({type(error).__name__}: {error}); make it for as many steps as the run has, or set trainer.lr_scheduler = "
        "None to go on at the present rates. A run that is resumed goes on with its checkpoint's schedule: for another "
        "one call load_checkpoint, assign trainer.lr_scheduler, and call train without resume"
    )


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _put_back(group: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in before.items():
        now = group.get(name)
        if isinstance(now, Tensor) and isinstance(value, Tensor):
            now.copy_(value)  # others may hold this very tensor
        else:
            group[name] = value
