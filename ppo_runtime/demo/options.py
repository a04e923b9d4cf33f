"""What the demo's command line can change, and what a run that goes on takes over from its beginning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ppo_runtime.files import write_whole

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
_KINDS: Mapping[str, Any] = {
    "model": str | None,
    "seed": int,
    "steps": int,
    "batch_size": int,
    "new_tokens": int,
    "learning_rate": float | int | None,
    "target": float | int,
    "accel": str,
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
        ValueError: the run that goes on was begun with another value than a given one, or its file is damaged.
    """
    begun = _begun_with(output) if resume else {}
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
    if chosen["batch_size"] % 2:
        raise ValueError(f"--batch-size is {chosen['batch_size']}, expected an even number: a step has two minibatches")
    if chosen["learning_rate"] is None:
        chosen["learning_rate"] = EMBEDDED_LEARNING_RATE if chosen["model"] is None else LEARNING_RATE
    return DemoOptions(output=output, resume=resume, **chosen)


def remember(options: DemoOptions) -> None:
    """Keep a run's options beside it, for :func:`settle`."""
    kept = {name: getattr(options, name) for name in DEFAULTS}
    kept["model"] = None if options.model is None else str(options.model.resolve())
    write_whole(options.output / _FILE, json.dumps(kept, indent=2) + "\n")


def _begun_with(output: Path) -> dict[str, Any]:
    path = output / _FILE
    if not path.is_file():
        return {}
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        fits = isinstance(begun, dict) and all(
            isinstance(begun.get(name, default), _KINDS[name]) for name, default in DEFAULTS.items()
        )
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{path} is damaged, expected the options that the run was begun with; remove it and give those options "
            "again beside --resume"
        )
    return begun


def _same(value: Any, earlier: Any) -> bool:
    return value.resolve() == earlier if isinstance(value, Path) else value == earlier
