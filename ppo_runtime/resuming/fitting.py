"""Whether a checkpoint and a trainer belong together: what both are made of, compared before anything changes."""

import json
import logging
from collections.abc import Iterator, Mapping, Set
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.common.redact import without_secrets
from ppo_runtime.learning.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.ranks.shards import here
from ppo_runtime.resuming.files import damaged
from ppo_runtime.resuming.making import made_otherwise
from ppo_runtime.resuming.records import StateRecord
from ppo_runtime.resuming.stepping import IMPLEMENTATION, OF_SOME_RELEASES, check_scheduled, is_of_torch
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)
logger.addFilter(lambda _: speaks_for_all())

_OUR_CONTROLLERS = AdaptiveKLController, FixedKLController
AS_THEN = "make the optimizer as it was made then: of the same class, over the same parameters in the same order"
_KEPT_RATE = "the scheduler and its learning rates are kept from the checkpoint"
_KEPT = "the checkpoint's is kept"
# What torch's schedulers change of an optimiser, and of themselves, from step to step.
_SCHEDULED = frozenset({"lr", "momentum", "betas"})
_MOVING = OF_SOME_RELEASES | {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i"}
# Functions of the user's own, and what follows from other settings.
_NO_SETTINGS = {"lr_lambdas", "base_lrs", "_schedule_phases"}


def optimizer_made_of(trainer: Trainer) -> dict[str, Any]:
    """The optimiser's class, and the names of each group's parameters in their order, to which its state belongs.

    Not the groups' options: a later torch adds some, and fills them in where they are missing.
    """
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [[names.get(id(p), "(not the model's)") for p in group["params"]] for group in _groups(trainer)]
    return {"class": type(trainer.optimizer).__name__, "groups": groups}


def scheduler_class(scheduler: Any) -> str | None:
    """The scheduler's class, with those that it is composed of; None without one."""
    if scheduler is None:
        return None
    parts = getattr(scheduler, "_schedulers", None)
    inner = f"({', '.join(str(scheduler_class(part)) for part in parts)})" if isinstance(parts, list | tuple) else ""
    return type(scheduler).__name__ + inner


def check_tensors(source: Path, stored: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names, dtypes or shapes."""
    differences = [
        *(f"{name} is missing from the model" for name in sorted(stored.keys() - present.keys())),
        *(f"{name} is missing from the checkpoint" for name in sorted(present.keys() - stored.keys())),
        *(
            f"{name} is {stored[name].dtype} {tuple(stored[name].shape)} in the checkpoint and "
            f"{present[name].dtype} {tuple(present[name].shape)} in the model"
            for name in sorted(stored.keys() & present.keys())
            if (stored[name].dtype, stored[name].shape) != (present[name].dtype, present[name].shape)
        ),
    ]
    if differences:
        raise ValueError(
            f"{source} was made with another model ({len(differences)} differences): {'; '.join(differences[:3])}"
        )


def check_optimizer_made(
    source: Path, then: Mapping[str, Any] | None, state: Mapping[str, Any], trainer: Trainer
) -> None:
    """Refuse the state of another kind of optimiser, or of parameters in another order.

    Args:
        source: the checkpoint, for the message.
        then: what ``optimizer_made_of`` said when it was made; None for one that is too old to know.
        state: the optimiser's state in it.
        trainer: whose optimiser shall take it over.
    """
    now = optimizer_made_of(trainer)
    if then is not None and then["class"] != now["class"]:
        raise ValueError(f"{source} holds the state of {then['class']}, and the optimizer is {now['class']}; {AS_THEN}")
    theirs = [len(group["params"]) for group in state["param_groups"]]
    ours = [len(group) for group in now["groups"]]
    if theirs != ours:
        raise ValueError(f"{source} holds an optimizer's groups of {theirs} parameters, and here are {ours}; {AS_THEN}")
    if then is not None and then["groups"] != now["groups"]:
        pairs = zip(chain(*then["groups"]), chain(*now["groups"]), strict=True)
        was, is_now = next((was, is_now) for was, is_now in pairs if was != is_now)
        raise ValueError(
            f"{source} holds an optimizer's state for {was} where the optimizer has {is_now} now; {AS_THEN}"
        )


def check_scheduler_state(source: Path, state: StateRecord, then: Any, scheduler: Any) -> None:
    """Refuse the state of another kind of scheduler, of one where there is none, or one that could not go on."""
    if (then is None) != (scheduler is None):
        raise ValueError(
            f"{source} has {'no' if then is None else 'an'} lr_scheduler state, and the trainer has "
            f"{'none' if scheduler is None else 'one'}; pass the same kind as then"
        )
    kind, now = state.scheduler_class, scheduler_class(scheduler)
    if kind != now and (kind is not None or state.format > 1):
        raise ValueError(
            f"{source} holds the state of {kind}, and the lr_scheduler is {now}; pass the same kind as then"
        )
    check_scheduled(source, then, scheduler)


def check_finite(source: Path, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse parameters that are not finite, of which no checkpoint is made."""
    for name in (name for name, parameter in model.named_parameters() if parameter.requires_grad):
        if weights[name].is_floating_point() and not bool(here(weights[name]).isfinite().all()):
            raise damaged(source, f"{name} holds numbers that are not finite")


def check_controller_state(source: Path, own: Mapping[str, Any], trainer: Trainer) -> None:
    """Refuse a coefficient that our controllers would."""
    if isinstance(trainer.kl_ctl, _OUR_CONTROLLERS) and (not own["kl_coef"] >= 0):
        raise damaged(source, f"kl_coef is {own['kl_coef']!r:.60}")


def settle_differences(
    state: StateRecord,
    now: Mapping[str, Any],
    trainer: Trainer,
    groups: list[dict[str, Any]],
    schedule: Mapping[str, Any] | None,
) -> None:
    """Put in force what is set otherwise than when the checkpoint was made, or say that the checkpoint decides it.

    Args:
        state: of the checkpoint.
        now: the settings of the trainer.
        trainer: into which it has been loaded.
        groups: the options of its optimiser's groups before that.
        schedule: the state of its scheduler before that.
    """
    then, now = without_secrets(state.config), json.loads(json.dumps(now, default=str))
    # What one of them does not know is no difference: settings come with versions.
    changed = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    said = []
    for name in changed:
        force = _FORCE[name](trainer, groups) if name in _FORCE else ""
        said.append(f"{name} was {then[name]!r:.80} and is {now[name]!r:.80}{f' ({force})' if force else ''}")
    said += made_otherwise(state.made_with or {}, trainer)
    scheduler = trainer.lr_scheduler
    if scheduler is None or is_of_torch(scheduler):  # another may change any option from step to step
        said += _other_options(trainer.optimizer, groups, frozenset() if scheduler is None else _SCHEDULED)
    if scheduler is not None and is_of_torch(scheduler):
        said += (other := [*_other_schedule(scheduler.state_dict(), schedule or {}, "lr_scheduler")])
        said += ["for another schedule assign trainer.lr_scheduler after load_checkpoint"] if other else []
    if said:
        logger.warning("the run goes on with other settings than the checkpoint's: %s", "; ".join(said))


def _force_rates(trainer: Trainer, groups: list[dict[str, Any]]) -> str:
    if trainer.lr_scheduler is not None:
        return _KEPT_RATE
    for group, before in zip(trainer.optimizer.param_groups, groups, strict=True):
        if before.get("lr") is not None:
            group["lr"] = before["lr"]
    rates = {float(group["lr"]) for group in groups if group.get("lr") is not None}
    return f"the optimizer goes on at {', '.join(f'{rate:g}' for rate in sorted(rates))}" if rates else ""


def _force_coefficient(trainer: Trainer, _: Any) -> str:
    if not isinstance(trainer.kl_ctl, _OUR_CONTROLLERS):
        return f"your controller goes on with the checkpoint's coefficient, {trainer.kl_ctl.value}"
    trainer.kl_ctl.value = trainer.config.init_kl_coef
    return f"the controller goes on from {trainer.kl_ctl.value:g}"


def _keep_generators(*_: Any) -> str:
    return "the random generators and the order of the data are kept from the checkpoint"


_FORCE = {"learning_rate": _force_rates, "init_kl_coef": _force_coefficient, "seed": _keep_generators}


def _other_options(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]], scheduled: Set[str]) -> list[str]:
    """What the checkpoint decides of an optimiser that was made with other options."""
    said: dict[str, None] = {}
    for group, made in zip(optimizer.param_groups, before, strict=True):
        for name in (made.keys() & (optimizer.defaults.keys() | {"initial_lr"})) - IMPLEMENTATION - scheduled:
            if not _same(group.get(name), made[name]):
                was, now = f"{group.get(name)!r:.60}", f"{made[name]!r:.60}"
                said[f"{name} of the optimizer was {was} and is {now} ({_KEPT})"] = None
    return sorted(said)


def _other_schedule(loaded: Mapping[str, Any], made: Mapping[str, Any], where: str) -> Iterator[str]:
    """What the checkpoint decides of a scheduler of torch's that was made otherwise."""
    for name in sorted((loaded.keys() & made.keys()) - _MOVING - _NO_SETTINGS):
        was, now = loaded[name], made[name]
        if name == "_schedulers":
            for index, (one, other) in enumerate(zip(was, now, strict=True)):
                yield from _other_schedule(one, other, f"{where}.{name}.{index}")
        elif not _same(was, now):
            yield f"{where}.{name} was {was!r:.60} and is {now!r:.60} ({_KEPT})"


def _same(one: Any, other: Any) -> bool:
    """Whether two options are equal; a number is that of a tensor as its dtype has it."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) != isinstance(other, Tensor):
        tensor, number = (one, other) if isinstance(one, Tensor) else (other, one)
        return isinstance(number, int | float) and bool(tensor == torch.as_tensor(number, dtype=tensor.dtype))
    return repr(one) == repr(other)


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.optimizer.param_groups
