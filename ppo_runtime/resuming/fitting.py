"""Whether a checkpoint and a trainer belong together: what both are made of, compared before anything changes."""

import json
import logging
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from ppo_runtime.common.redact import without_secrets
from ppo_runtime.learning.optimisers import fits, moments_of, steps_as_torch
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)

# What a checkpoint's own state decides, whatever is configured now, and where to change it then.
_KEPT = {
    "init_kl_coef": "the coefficient is kept from the checkpoint; set trainer.kl_ctl.value for another",
    "seed": "the random generators are kept from the checkpoint",
}
_KEPT_RATE = "the scheduler and its learning rates are kept from the checkpoint"


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


def check_optimizer_state(
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
    advice = "make the optimizer as it was made then: of the same class, over the same parameters in the same order"
    if then is not None and then["class"] != now["class"]:
        raise ValueError(f"{source} holds the state of {then['class']}, and the optimizer is {now['class']}; {advice}")
    theirs = [len(group["params"]) for group in state["param_groups"]]
    ours = [len(group) for group in now["groups"]]
    if theirs != ours:
        raise ValueError(f"{source} holds an optimizer's groups of {theirs} parameters, and here are {ours}; {advice}")
    if then is not None and then["groups"] != now["groups"]:
        pairs = zip(chain(*then["groups"]), chain(*now["groups"]), strict=True)
        was, is_now = next((was, is_now) for was, is_now in pairs if was != is_now)
        raise ValueError(
            f"{source} holds an optimizer's state for {was} where the optimizer has {is_now} now; {advice}"
        )
    _check_moments(source, state, trainer, advice)


def check_scheduler_state(source: Path, state: Mapping[str, Any], scheduler: Any) -> None:
    """Refuse the state of another kind of scheduler, or of one where there is none."""
    if (state["lr_scheduler"] is None) != (scheduler is None):
        raise ValueError(
            f"{source} has {'no' if state['lr_scheduler'] is None else 'an'} lr_scheduler state, and the trainer has "
            f"{'none' if scheduler is None else 'one'}; pass the same kind as then"
        )
    then, now = state.get("scheduler_class", scheduler_class(scheduler)), scheduler_class(scheduler)
    if then != now:
        raise ValueError(
            f"{source} holds the state of {then}, and the lr_scheduler is {now}; pass the same kind as then"
        )


def warn_of_differences(then: Mapping[str, Any], now: Mapping[str, Any], *, scheduled: bool) -> set[str]:
    """The names of the settings that differ; they are told, with what the checkpoint's state decides all the same."""
    then, now = without_secrets(then), json.loads(json.dumps(now, default=str))
    kept = _KEPT | ({"learning_rate": _KEPT_RATE} if scheduled else {})
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    said = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}" + (f" ({kept[name]})" if name in kept else "")
        for name in changed
    ]
    if said:
        logger.warning("the run goes on with other settings than the checkpoint's: %s", "; ".join(said))
    return set(changed)


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.optimizer.param_groups


def _check_moments(source: Path, state: Mapping[str, Any], trainer: Trainer, advice: str) -> None:
    """Refuse moments of another shape, where torch's own optimisers say what it must be."""
    if not steps_as_torch(trainer.optimizer):
        return
    parameters = [parameter for group in _groups(trainer) for parameter in group["params"]]
    places = [place for group in state["param_groups"] for place in group["params"]]
    for place, parameter in zip(places, parameters, strict=True):
        for name, moment in moments_of(state["state"].get(place, {})):
            if not fits(moment, parameter):
                raise ValueError(
                    f"{source} holds {name} of shape {tuple(moment.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}; {advice}"
                )
