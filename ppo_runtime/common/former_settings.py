"""Settings by the names and values of TRL's earlier releases: accepted, with a warning that says what holds now."""

import warnings
from collections.abc import Container, Mapping
from typing import Any

RENAMED = {"forward_batch_size": "mini_batch_size", "optimize_cuda_cache": "optimize_device_cache"}
DROPPED = {
    "backward_batch_size": "it is mini_batch_size * gradient_accumulation_steps",
    "dataset_num_proc": "the trainer tokenises nothing; give num_proc to the map of your dataset",
    "global_backward_batch_size": "it follows from backward_batch_size and the number of processes",
    "global_batch_size": "it follows from batch_size and the number of processes",
    "gradient_checkpointing": "call model.gradient_checkpointing_enable()",
    "total_ppo_epochs": "it is steps / batch_size, rounded up",
    "world_size": "it is the number of processes that torchrun has started",
}
"""What a former setting is instead."""

NORM_ALONE = (
    "use_score_norm is True and use_score_scaling False: scores are then left as they are; set use_score_scaling=True "
    "for both, or use_score_norm=False"
)


def is_former(name: str) -> bool:
    """Whether a setting has another name now, or none."""
    return name in RENAMED or name in DROPPED


def translated(settings: Mapping[str, Any], *, own: Container[str] = (), stacklevel: int) -> dict[str, Any]:
    """The settings by their present names. A former name whose value asks for nothing (None, False) goes silently.

    Args:
        settings: by present or former names.
        own: names that mean something of a subclass's own, whatever an earlier release meant by them.
        stacklevel: of the warnings, counted from the caller of this function.

    Raises:
        ValueError: a setting is given by both its names, with different values.
    """
    present = {name: value for name, value in settings.items() if name in own or not is_former(name)}
    for name in settings.keys() - present.keys():
        value = settings[name]
        if name in RENAMED and value is not None:
            now = settings.get(RENAMED[name])
            if now is not None and now != value:
                raise ValueError(
                    f"{name} is {value!r} and {RENAMED[name]} is {now!r}, expected one of them alone: {name} is the "
                    f"former name of {RENAMED[name]}"
                )
            present[RENAMED[name]] = value
            _warn(f"{name} is now {RENAMED[name]}, which is set to {value!r}", stacklevel)
        elif name in DROPPED and value:
            _warn(f"{name} = {value!r} does nothing: {DROPPED[name]}", stacklevel)
    if "optimize_device_cache" in present and present["optimize_device_cache"] is None:
        present["optimize_device_cache"] = False
        _warn("optimize_device_cache is None, which is taken for False", stacklevel)
    return present


def warn_of_norm_alone(settings: Mapping[str, Any], *, stacklevel: int) -> None:
    """Say that ``use_score_norm`` has no effect where ``use_score_scaling`` is off."""
    if settings.get("use_score_norm") is True and not settings.get("use_score_scaling", False):
        _warn(NORM_ALONE, stacklevel)


def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, UserWarning, stacklevel=stacklevel + 2)
