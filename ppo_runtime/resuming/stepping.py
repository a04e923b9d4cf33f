"""Whether an optimiser and a scheduler could step on from a stored state: options, moments and counters.

Of torch's own kinds torch is asked: one is made with the stored options, and steps on a parameter of one entry. What is
a user's own is taken as it is.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_runtime.learning.optimisers import fits, moments_of, steps_as_torch
from ppo_runtime.ranks.shards import here
from ppo_runtime.resuming.fields import LARGEST
from ppo_runtime.resuming.files import damaged

# How a step is carried out, which is for the machine at hand to say, and changes no more than the last bits.
IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
# What some releases of torch keep in a scheduler's state and others do not.
OF_SOME_RELEASES = frozenset({"_is_initial", "_get_lr_called_within_step", "verbose"})
_COUNTERS = frozenset({"last_epoch", "_step_count"})


def with_present_implementation(state: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimiser's stored state, its steps carried out as those of the present groups; what it lacks is theirs."""
    stored = [
        {**now, **group, **{name: now[name] for name in IMPLEMENTATION & now.keys()}}
        for group, now in zip(state["param_groups"], groups, strict=True)
    ]
    return {**state, "param_groups": stored}


def check_steps(source: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer, advice: str) -> None:
    """Refuse options that torch would, moments that do not fit, and numbers that no step has left.

    Args:
        source: the checkpoint, for the messages.
        state: of the optimiser, of as many groups and parameters as it has.
        optimizer: which shall take it over.
        advice: what to do about an optimiser that was made otherwise.
    """
    if not steps_as_torch(optimizer):
        return
    check_shapes(source, state, optimizer, advice)
    groups = state["param_groups"]
    kind = next(kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim"))
    for group, now in zip(groups, optimizer.param_groups, strict=True):
        takes = inspect.signature(kind).parameters.keys() - IMPLEMENTATION - {"params"}
        _check_options(source, group, now, takes, advice)
        options = {name: value for name, value in group.items() if name in takes}
        for place, parameter in zip(group["params"], now["params"], strict=True):
            held = state["state"].get(place, {})
            try:
                wanted = _entries(kind, tuple(sorted(options.items())), parameter.ndim)
            except (TypeError, ValueError) as error:
                raise damaged(source, f"the optimizer's options: {error}") from error
            for name, moment in wanted.items() if held else ():
                if not isinstance(held.get(name), Tensor if moment else Tensor | int | float):
                    raise damaged(source, f"the optimizer's state of a parameter has no {name}")
            for name, value in held.items():
                _check_entry(source, name, value)


def check_shapes(source: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer, advice: str) -> None:
    """Refuse moments that do not fit, of which outlines are enough; see :func:`check_steps`."""
    if not steps_as_torch(optimizer):
        return
    groups = state["param_groups"]
    places = [place for group in groups for place in group["params"]]
    if places != list(range(len(places))) or not set(state["state"]) <= set(places):
        raise damaged(source, "the optimizer's parameters are not numbered as torch numbers them")
    for group, now in zip(groups, optimizer.param_groups, strict=True):
        for place, parameter in zip(group["params"], now["params"], strict=True):
            for name, moment in moments_of(state["state"].get(place, {})):
                if not fits(moment, parameter):
                    raise ValueError(
                        f"{source} holds {name} of shape {tuple(moment.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}; {advice}"
                    )


def check_scheduled(source: Path, then: Any, scheduler: Any) -> None:
    """Refuse a state in which one of torch's schedulers could not go on."""
    if scheduler is not None and is_of_torch(scheduler):
        for what in _misfits(then, scheduler.state_dict(), "lr_scheduler"):
            raise ValueError(f"{source} does not fit this lr_scheduler ({what}); make it as it was made then")


def is_of_torch(scheduler: Any) -> bool:
    """Whether a scheduler is one of torch's own, whose state is known."""
    return type(scheduler).__module__ == torch.optim.lr_scheduler.__name__


def _check_options(source: Path, then: Mapping[str, Any], now: Mapping[str, Any], takes: Set[str], advice: str) -> None:
    for name, value in now.items():
        if name in IMPLEMENTATION or name == "params":
            continue
        if name not in takes and (name not in then or not _is_number(value)):  # the user's own, of which no step knows
            continue
        stored = then.get(name, value if value is None else False)  # as a later torch fills in what an earlier lacks
        if isinstance(value, bool) and isinstance(stored, bool):
            if value != stored:
                raise ValueError(f"{source} holds an optimizer of {name}={stored}, and here it is {value}; {advice}")
        elif not _alike(stored, value):
            raise ValueError(
                f"{source} holds an optimizer of {name}={stored!r:.60}, and here it is {value!r:.60}; {advice}"
            )
    for name in ("lr", "initial_lr"):
        if isinstance(rate := then.get(name), int | float) and rate < 0:
            raise damaged(source, f"the optimizer's {name} is {rate}")


def _alike(then: Any, now: Any) -> bool:
    """Whether an option is of the kind that it has here, and no number is beyond float32."""
    if isinstance(now, list | tuple):
        return isinstance(then, list | tuple) and len(then) == len(now) and all(map(_alike, then, now))
    if _is_number(now):
        return _is_number(then) and (_is_finite(then) or not _is_finite(now))
    return type(then) is type(now)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and not value.ndim
    )


def _is_finite(value: Any) -> bool:
    try:
        return abs(float(value)) <= LARGEST
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _check_entry(source: Path, name: str, value: Any) -> None:
    """Refuse what no step leaves for a parameter."""
    if isinstance(value, Tensor) and value.ndim:
        fine = not value.is_floating_point() or bool(here(value).isfinite().all())
    elif _is_number(value):
        fine = _is_finite(value) and (name != "step" or (float(value) >= 0 and float(value).is_integer()))
    else:
        fine = value is None
    if not fine:
        raise damaged(source, f"the optimizer holds numbers that are not finite, or none at all, as {name}")


def _entries(kind: type, options: tuple[tuple[str, Any], ...], ndim: int) -> dict[str, bool]:
    """What such an optimiser holds for a parameter of as many axes, and whether it has axes, found out by a step.

    Nothing where it cannot step.

    Raises:
        ValueError, TypeError: it refuses the options.
    """
    try:
        return _tried(kind, options, ndim)
    except TypeError:  # options that cannot be remembered, such as a rate that is a tensor; or that it refuses
        return _tried.__wrapped__(kind, options, ndim)


@cache
def _tried(kind: type, options: tuple[tuple[str, Any], ...], ndim: int) -> dict[str, bool]:
    parameter = torch.zeros([1] * ndim, requires_grad=True)
    optimizer = kind([parameter], **dict(options))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception:  # it wants another kind of parameter or gradient
        return {}
    held = optimizer.state[parameter].items()
    return {name: isinstance(value, Tensor) and value.ndim > 0 for name, value in held if value is not None}


def _misfits(then: Any, now: Any, where: str) -> Iterator[str]:
    """Where a scheduler's stored state is of another kind than the present one's."""
    if isinstance(now, Counter):  # milestones
        if not isinstance(then, Counter) or not all(_natural(key) and _natural(count) for key, count in then.items()):
            yield f"{where} is {then!r:.60}, expected counted steps"
    elif isinstance(now, Mapping):
        if not isinstance(then, Mapping):
            yield f"{where} is a {type(then).__name__}, expected fields with names"
            return
        if odd := (then.keys() ^ now.keys()) - OF_SOME_RELEASES:
            yield f"{where} has {', '.join(sorted(map(repr, odd)))} or should"
            return
        for name in then.keys() & now.keys() - {"lr_lambdas"}:  # which are functions of the user's own
            if name in _COUNTERS and not _natural(then[name]) and then[name] != now[name]:  # -1 before its turn
                yield f"{where}.{name} is {then[name]!r:.60}, expected a number of steps"
            yield from _misfits(then[name], now[name], f"{where}.{name}")
    elif isinstance(now, list | tuple):
        if not isinstance(then, list | tuple) or len(then) != len(now):
            yield f"{where} is {then!r:.60}, expected {len(now)} entries"
            return
        for index, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from _misfits(one, other, f"{where}.{index}")
    elif _is_number(now):
        if not _is_number(then) or not _is_finite(then) or (float(then) < 0 <= float(now)):
            yield f"{where} is {then!r:.60}, expected a number such as {now!r:.60}"
    elif isinstance(now, str | bool) and then != now:
        yield f"{where} is {then!r:.60}, and here it is {now!r}"


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
