"""A user's optimiser and scheduler, checked when the trainer is made: later, weights would have moved."""

import inspect
import logging
import math
from typing import Any

import torch

from ppo_runtime.models.inner import pretrained_model

logger = logging.getLogger(__name__)


def check_trains(model: torch.nn.Module) -> None:
    """Refuse a policy of which nothing can be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model has no parameter that trains, expected at least one with requires_grad; call "
            "model.requires_grad_(True), or make the parts that shall train trainable before the trainer is made"
        )


def check_optimizer(optimizer: Any, model: torch.nn.Module) -> None:
    """Refuse what is no optimiser, or one that would train nothing of the policy.

    Raises:
        TypeError: no optimiser, or one whose step wants a closure.
        ValueError: none of the policy's trainable parameters is in it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {_kind(optimizer)}, expected a torch.optim.Optimizer over the policy's parameters, or "
            "None for Adam at learning_rate"
        )
    if missing := _wanted(optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, whose step() wants {missing}, which the trainer has none of; "
            "expected one that steps on gradients alone"
        )
    held, count = _held(optimizer, model)
    if not held:
        raise ValueError(
            f"optimizer holds none of the {count} parameters of model that train, and so would train nothing; make "
            "it of model.parameters(), after the model has been wrapped, moved and given its adapters"
        )


def say_what_stays(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Log a warning where the policy's language model, or a part of what trains, would stay as it is."""
    held, count = _held(optimizer, model)
    if held < count:
        logger.warning(
            "optimizer holds %d of the %d parameters that train: the others will stay as they are", held, count
        )
    if not any(parameter.requires_grad for parameter in pretrained_model(model).parameters()):
        logger.warning(
            "nothing of the language model trains, only what is beside it (the value head): the policy will stay as it "
            "is. Make it trainable before the trainer is made, with model.requires_grad_(True), or for a stored "
            "adapter from_pretrained(..., is_trainable=True)"
        )


def _held(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> tuple[int, int]:
    """How many of the model's parameters that train are the optimiser's, and how many there are."""
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(id(parameter) in theirs for parameter in ours), len(ours)


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse what cannot be stepped without arguments, or schedules another optimiser; None is the trainer's own.

    Raises:
        TypeError: no scheduler, one whose step wants an argument, or one without a state to store.
        ValueError: a scheduler of another optimiser.
    """
    if scheduler is None:
        return
    check_kind_of_scheduler(scheduler)
    scheduled = getattr(scheduler, "optimizer", optimizer)
    if scheduled is not optimizer and scheduled is not getattr(optimizer, "optimizer", None):
        raise ValueError(
            "lr_scheduler is of another optimizer than the trainer's, and so would schedule nothing; pass the one that "
            "it was made of as optimizer="
        )


def check_kind_of_scheduler(scheduler: Any) -> None:
    """Refuse what cannot be stepped without arguments, or has no state to go back to.

    Raises:
        TypeError: likewise.
    """
    if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"lr_scheduler is a {_kind(scheduler)}, expected a scheduler made of the optimizer, such as "
            "torch.optim.lr_scheduler.ConstantLR(optimizer); pass that optimizer as well"
        )
    if missing := _wanted(scheduler):
        raise TypeError(
            f"lr_scheduler is a {type(scheduler).__name__}, whose step() wants {missing}; expected one that needs no "
            "argument, since it is stepped once after every step. Step this one yourself, with what step returns"
        )
    for name in ("state_dict", "load_state_dict"):
        if not callable(getattr(scheduler, name, None)):
            raise TypeError(
                f"lr_scheduler is a {type(scheduler).__name__} without {name}, expected one whose state can be stored "
                "and taken over, as that of torch's can: checkpoints hold it; derive it from "
                "torch.optim.lr_scheduler.LRScheduler, or step this one yourself"
            )


def first_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Of the first group, for the statistics; NaN where the optimiser finds a rate of its own, as Adafactor may."""
    rate = optimizer.param_groups[0].get("lr")
    return math.nan if rate is None else float(rate)


def _kind(value: Any) -> str:
    return f"class ({value.__name__})" if isinstance(value, type) else type(value).__name__


def _wanted(stepper: Any) -> str:
    """The arguments that its ``step`` cannot do without."""
    # The class's own: torch's schedulers wrap the optimiser's in something of another signature.
    inherited = getattr(type(stepper), "step", None)
    try:
        parameters = list(inspect.signature(inherited or stepper.step).parameters.values())
    except (TypeError, ValueError):  # written in C
        return ""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = parameters[1:] if inherited else parameters
    return ", ".join(p.name for p in parameters if p.kind in named and p.default is inspect.Parameter.empty)
