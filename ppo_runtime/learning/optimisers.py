"""Optimiser and scheduler, checked before they step: later, weights would have moved."""

import inspect
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.models.inner import is_merged, pretrained_model

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())


def check_trains(model: torch.nn.Module) -> None:
    """Refuse a policy of which nothing can be trained, or whose adapter would not see that it is."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model has no parameter that trains, expected at least one with requires_grad; call "
            "model.requires_grad_(True), or make the parts that shall train trainable before the trainer is made"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model was made inside torch.inference_mode(), expected parameters that gradients can be computed of; load "
            "it outside"
        )
    if is_merged(model):
        raise ValueError(
            "model has an adapter that is merged into its weights, expected one beside them: no pass would reach it, "
            "and so it would not train; call model.pretrained_model.unmerge_adapter() first"
        )
    if any(getattr(part, "_disable_adapters", False) is True for part in model.modules()):  # peft has no public word
        raise ValueError(
            "model has an adapter that is switched off, expected one that is on: no pass would reach it, and so it "
            "would not train; call model.pretrained_model.base_model.enable_adapter_layers() first"
        )


def check_optimizer(optimizer: Any, model: torch.nn.Module) -> None:
    """Refuse what is no optimiser, or one that would train nothing of the policy.

    Raises:
        TypeError: no optimiser, or one whose step wants a closure.
        ValueError: none of the policy's trainable parameters is in it, or it does not fit them (`check_fits`).
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
    check_fits(optimizer, model)


def check_fits(optimizer: Any, model: torch.nn.Module) -> None:
    """Refuse an optimiser that would step past the end of what it holds; cheap enough for every step.

    A fused kernel takes the number of entries and the order of memory from the parameter alone: moments of a smaller
    one are read and written beyond their end, and so is whatever lies between the rows of a view.

    Raises:
        ValueError: it is one of torch's own and holds a moment of another shape or dtype than its parameter's, or it is
            fused and a parameter or a moment is not contiguous.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside a wrapper such as accelerate's
    if not steps_as_torch(optimizer):
        return
    for group in optimizer.param_groups:
        fused = bool(group.get("fused"))
        for parameter in (one for one in group["params"] if one.requires_grad):
            if fused and not parameter.is_contiguous():
                raise ValueError(
                    f"the fused optimizer steps {_name(parameter, model)} of shape {tuple(parameter.shape)} and "
                    f"strides {parameter.stride()}, expected contiguous memory, which alone its kernel reads: call "
                    "parameter.data = parameter.data.contiguous(), or give the trainer an optimizer with fused=False"
                )
            for key, moment in moments_of(optimizer.state.get(parameter, {})):
                if not fits(moment, parameter, factored=not fused):
                    raise ValueError(
                        f"optimizer holds {key} of shape {tuple(moment.shape)} for {_name(parameter, model)} of shape "
                        f"{tuple(parameter.shape)}, expected the same: one of them has changed since. Make a new "
                        "optimizer of model.parameters() and assign it to trainer.optimizer, or begin its moments anew "
                        "with trainer.optimizer.state.clear()"
                    )
                if moment.dtype is not parameter.dtype:
                    raise ValueError(
                        f"optimizer holds {key} of {_name(parameter, model)} in {moment.dtype}, expected "
                        f"{parameter.dtype} like the parameter: one of them has changed since. Turn the model back, "
                        "with model.float() as a rule, or begin the moments anew with trainer.optimizer.state.clear()"
                    )
                if fused and not moment.is_contiguous():
                    raise ValueError(
                        f"the fused optimizer holds {key} of {_name(parameter, model)} with strides {moment.stride()}, "
                        "expected contiguous memory, which alone its kernel reads: load a state of contiguous "
                        "moments, or begin them anew with trainer.optimizer.state.clear()"
                    )


def fits(moment: Tensor, parameter: Tensor, *, factored: bool = True) -> bool:
    """Whether a moment has a parameter's shape, or that shape with axes of 1 where it may be factored."""
    if not factored:
        return moment.shape == parameter.shape
    sizes = zip(moment.shape, parameter.shape, strict=False)
    return moment.ndim == parameter.ndim and all(size in (1, whole) for size, whole in sizes)


def moments_of(state: Any) -> list[tuple[str, Tensor]]:
    """The tensors that an optimiser holds for one parameter, numbers such as a count of steps left out."""
    return [(key, value) for key, value in state.items() if isinstance(value, Tensor) and value.ndim]


def steps_as_torch(optimizer: Any) -> bool:
    """Whether its step is one of torch's own, of whose moments the shapes are known."""
    return type(optimizer).step.__module__.startswith("torch.optim")


def _name(parameter: Tensor, model: torch.nn.Module) -> str:
    names = (name for name, one in model.named_parameters() if one is parameter)
    return "the parameter " + next(names, "(not the model's)")


def say_what_stays(optimizer: torch.optim.Optimizer, model: torch.nn.Module, said: set[str]) -> None:
    """Log a warning where the policy's language model, or a part of what trains, would stay as it is.

    ``said`` are the sentences of earlier times, which are not said again.
    """
    for sentence in _what_stays(optimizer, model):
        if sentence not in said:
            said.add(sentence)
            logger.warning("%s", sentence)


def _what_stays(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Iterator[str]:
    held, count = _held(optimizer, model)
    if held < count:
        theirs = _theirs(optimizer)
        first = next(n for n, one in model.named_parameters() if one.requires_grad and id(one) not in theirs)
        yield (
            f"optimizer holds {held} of the {count} parameters that train: the others will stay as they are (the "
            f"first: {first}). Where that is not meant, assign trainer.optimizer one that is made of all of them"
        )
    if not any(parameter.requires_grad for parameter in pretrained_model(model).parameters()):
        yield (
            "nothing of the language model trains, only what is beside it (the value head): the policy will stay as it "
            "is. Make it trainable before the trainer is made, with model.requires_grad_(True), or for a stored "
            "adapter from_pretrained(..., is_trainable=True)"
        )


def _theirs(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def beside(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters of the user's own that the optimiser steps beside the model's, whose gradients nobody else sums."""
    ours = {id(parameter) for parameter in model.parameters()}
    return [one for group in optimizer.param_groups for one in group["params"] if id(one) not in ours]


def _held(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> tuple[int, int]:
    """How many of the model's parameters that train are the optimiser's, and how many there are."""
    theirs = _theirs(optimizer)
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
