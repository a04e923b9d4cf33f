"""What the demo's command line can change, and what a run that goes on takes over from its beginning."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ppo_runtime.common.files import write_whole
from ppo_runtime.common.launcher import processes_started

EMBEDDED_LEARNING_RATE = 3e-4
LEARNING_RATE = 5e-5
DEFAULTS: Mapping[str, Any] = {
    "model": None,
    "seed": 0,
    "steps": 32,
    "batch_size": 64,
    "new_tokens": 24,
    "learning_rate": None,
    "target": 8.0,
    "accel": "auto",
}
# What may be another from one part of a run to the next: how far it goes, and what computes the same numbers.
_FREE = ("steps", "accel")
_FILE = "options.json"


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max  # which neither NaN nor infinity is


# What each option has to be, wherever it comes from.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: value is None or (isinstance(value, str | Path) and str(value) != ""), "a directory"),
    "seed": (lambda value: _whole(value, 0), "a whole number from 0"),
    "steps": (lambda value: _whole(value, 1), "a whole number from 1"),
    "batch_size": (
        lambda value: _whole(value, 2) and value % 2 == 0,
        "an even number from 2: a step has two minibatches",
    ),
    "new_tokens": (lambda value: _whole(value, 1), "a whole number from 1"),
    "learning_rate": (lambda value: value is None or _positive(value), "a finite number above 0"),
    "target": (_positive, "a finite number above 0"),
    "accel": (lambda value: isinstance(value, str), "the name of a backend, such as auto"),
}


@attrs.frozen
class DemoOptions:
    """What the command line can change."""

    model: Path | None
    """A transformers directory; the embedded model if None."""
    output: Path
    seed: int
    steps: int
    batch_size: int
    new_tokens: int
    learning_rate: float
    target: float
    """KL to hold, nats per sequence."""
    accel: str
    resume: bool
    """Go on with the run in ``output``."""


def settle(given: Mapping[str, Any], *, output: Path, resume: bool) -> DemoOptions:
    """The options of a run: those given, else those it was begun with, else the defaults.

    Raises:
        ValueError: an option cannot be; the run that goes on was begun with another value than a given one, or its
            file is damaged.
    """
    for name in DEFAULTS:
        if (value := given.get(name)) is not None and (misfit := _misfit(name, value)):
            raise ValueError(f"--{name.replace('_', '-')} {misfit}")
    begun = _begun_with(output) if resume else {}
    _on_these_ranks(begun)
    chosen: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        value, earlier = given.get(name), begun.get(name, default)
        if name == "model" and earlier is not None:
            earlier = Path(earlier)
        if value is not None and name in begun and name not in _FREE and not _same(value, earlier):
            option = name.replace("_", "-")
            was = "the embedded one" if earlier is None else str(earlier)
            raise ValueError(
                f"--{option} is {value}, and the run in {output} was begun with {was}; leave --{option} out to go on "
                "with that run, or begin another with another --output"
            )
        chosen[name] = earlier if value is None else value
    if chosen["learning_rate"] is None:
        chosen["learning_rate"] = EMBEDDED_LEARNING_RATE if chosen["model"] is None else LEARNING_RATE
    return DemoOptions(output=output, resume=resume, **chosen)


def remember(options: DemoOptions) -> None:
    """Make a run's directory and keep its options there, for :func:`settle`."""
    options.output.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(options, name) for name in DEFAULTS}
    kept["ranks"] = processes_started()
    kept["model"] = None if options.model is None else str(options.model.resolve())
    write_whole(options.output / _FILE, json.dumps(kept, indent=2) + "\n")


def has_begun(output: Path) -> bool:
    """Whether a run has begun in a directory, and so can be resumed."""
    return (output / _FILE).is_file()


def _begun_with(output: Path) -> dict[str, Any]:
    path = output / _FILE
    if not path.is_file():
        return {}
    begun: dict[str, Any] = {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        read = None
    if not isinstance(read, dict):
        misfits = ["expected the options that the run was begun with"]
    else:
        begun = read
        found = {name: _misfit(name, begun[name]) for name in DEFAULTS if name in begun}
        misfits = [f"{name} {misfit}" for name, misfit in found.items() if misfit]
    if misfits:
        raise ValueError(
            f"{path} is damaged, {misfits[0]}; remove it and give the options that the run was begun with again beside "
            "--resume"
        )
    return begun


def _on_these_ranks(begun: dict[str, Any]) -> None:
    """Have a run that was begun on another number of ranks go on with as many sequences in a step, of all of them."""
    then, now = begun.get("ranks"), processes_started()
    if isinstance(then, int) and "batch_size" in begun:
        share, rest = divmod(begun["batch_size"] * then, now)
        if not rest and not _misfit("batch_size", share):
            begun["batch_size"] = share


def _misfit(name: str, value: Any) -> str:
    """What is wrong with an option's value; nothing if it can be."""
    fits, expected = _KINDS[name]
    return (
        "" if fits(value) else f"is {str(value) if isinstance(value, Path) else f'{value!r:.60}'}, expected {expected}"
    )


def _same(value: Any, earlier: Any) -> bool:
    return value.resolve() == earlier if isinstance(value, Path) else value == earlier
