"""What a run leaves in its output directory beside its checkpoints: the model, and a record of how it was made."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from safetensors import SafetensorError

from ppo_runtime.common.files import filled_whole, told_again, write_whole
from ppo_runtime.common.redact import plain_settings
from ppo_runtime.reporting.model_card import is_ours
from ppo_runtime.resuming.files import STATE, check_replaceable, rank_file
from ppo_runtime.resuming.reading import runs_in
from ppo_runtime.trainer import Trainer

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(pytorch_|adapter_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)

MODEL, BROKEN_OFF, RECORD = "model", "model-broken-off", "run.json"


def check_places(output_dir: Path, *, done: int, steps: int) -> None:
    """Refuse a run whose results would find something else in their places at its end.

    Args:
        output_dir: of the run.
        done: the steps that the run begins after.
        steps: after which it ends.

    Raises:
        ValueError: it is a checkpoint; or a checkpoint's, a model's or the record's place holds what they cannot
            replace.
    """
    if all((output_dir / name).is_file() for name in (STATE, rank_file(0))):
        own, of_run = output_dir.resolve(), ""
        if own.name.startswith("checkpoint"):
            of_run = f"pass {str(own.parent)!r} and resume=True to go on with the run that it lies in, or "
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which is a checkpoint itself, expected the directory of a run; "
            f"{of_run}load it by load_checkpoint and choose another output_dir"
        )
    for place in sorted(output_dir.glob("checkpoint-*")):
        step = place.name.removeprefix("checkpoint-")
        if step.isdecimal() and done < int(step) <= steps:
            check_replaceable(place, advice="move it, or choose another output_dir")
    for name in (MODEL, BROKEN_OFF):
        if (place := output_dir / name).exists() and not place.is_dir():
            raise ValueError(
                f"{place} is a file, expected a directory for the policy; move it, or choose another output_dir"
            )
    if (place := output_dir / RECORD).is_dir():
        raise ValueError(
            f"{place} is a directory, expected a file for the run's record; move it, or choose another output_dir"
        )


def own_directory(trainer: Trainer, output_dir: Path, *, newest: Path | None, done: int | None, resume: bool) -> None:
    """Refuse a run where another one's results lie, which it would replace.

    Args:
        trainer: one that has made steps goes on with its own run, and with no other.
        output_dir: of the run.
        newest: the checkpoint there; None without one.
        done: the steps of that.
        resume: what the caller asked for.
    """
    own = trainer.current_step > 0 and (
        # Rank 0 alone has the names that are written.
        trainer.world.rank != 0
        or bool(_names(trainer) & (_runs_recorded(output_dir) if newest is None else runs_in(newest)))
    )
    if resume:
        if newest is None and not own:
            _begin_again(output_dir)
        return
    if own:
        return
    stepped = f"the run that this trainer has made {trainer.current_step} steps of"
    if done is not None and trainer.current_step:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds the checkpoint of another run after step {done}, "
            f"expected none or one of {stepped}; choose another output_dir, or load that checkpoint first"
        )
    if done is not None:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds the checkpoint of a run after step {done}, expected a "
            "directory without one for a new run; pass resume=True to go on with that run, or choose another output_dir"
        )
    for name in (MODEL, BROKEN_OFF, RECORD):
        if (output_dir / name).exists():
            expected = f"none or that of {stepped}" if trainer.current_step else "a directory without one for a new run"
            raise ValueError(
                f"output_dir is {str(output_dir)!r}, which holds {name!r}, expected {expected}, which would replace "
                "it; move it, or choose another output_dir"
            )


def _begin_again(output_dir: Path) -> None:
    """Refuse to begin a finished run again, whose checkpoints are gone, or over no run's model.

    A run that was broken off may be begun again.
    """
    record = _recorded(output_dir)
    held = [name for name in (MODEL, BROKEN_OFF) if any(map(_are_weights, output_dir.joinpath(name).glob("*")))]
    if held and not record:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds a model in {held[0]!r} and neither a checkpoint nor the "
            f"{RECORD} of its run: beginning again would replace it; move it, or choose another output_dir"
        )
    try:
        finished = record["steps_done"] >= record["steps"]
    except (LookupError, TypeError):
        return
    if finished:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, which holds the results of a finished run and no checkpoint, expected "
            f"one to go on from: beginning again would replace {MODEL!r}; put the checkpoint back, or choose another "
            "output_dir"
        )


def _recorded(output_dir: Path) -> dict[str, Any]:
    """The record there; nothing without one that can be read."""
    try:
        record = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _runs_recorded(output_dir: Path) -> set[str | None]:
    """The names of the parts of the run that has left its record; None for one of before names."""
    record = _recorded(output_dir)
    runs = record.get("runs", [None]) if record else []
    return {name for name in runs if isinstance(name, str | None)} if isinstance(runs, list) else set()


def _names(trainer: Trainer) -> set[str | None]:
    """Of the parts of the trainer's run, this one among them."""
    return {trainer.run_log.run_name, *trainer.run_log.earlier_runs}


def save_results(trainer: Trainer, output_dir: Path, *, steps: int, changed: bool) -> None:
    """Write the policy and then the record of a run, each whole or as it was before; only rank 0 does.

    Weights between two steps go to a place of their own.

    Args:
        trainer: whose policy is saved.
        output_dir: of the run.
        steps: that were asked for.
        changed: whether the policy is another than when the run began; one that lies there already is left alone else.

    Raises:
        OSError: one of them could not be written; what was in its place is kept.
    """
    weights = trainer.parallel.saved_as(trainer.model)
    if trainer.world.rank != 0 or (not changed and _saved_already(trainer, output_dir)):
        return
    model = output_dir / (BROKEN_OFF if trainer.broken_off else MODEL)
    after = f"the model after step {trainer.current_step}"
    with (
        _told(f"{after} was not saved in {model}", "What was there before is kept"),
        filled_whole(model, replaces=_not_a_users_card, drops=_are_weights) as draft,
    ):
        trainer.save_pretrained(draft, **weights)
    with _told(
        f"{RECORD} was not written", f"{model} holds {after}, and {RECORD} still tells of what was there before"
    ):
        write_whole(output_dir / RECORD, json.dumps(_record(trainer, steps), indent=2, default=str) + "\n")
    if trainer.broken_off:
        logger.warning(
            "weights between two steps are in %s; those after step %d in the last checkpoint",
            model,
            trainer.current_step,
        )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    saved = weights.get("state_dict", {}).values() or trained  # the former where this rank has a part alone
    if not all(bool(x.isfinite().all()) for x in saved if x.is_floating_point()):
        logger.warning("the saved model in %s holds weights that are not finite", model)


@contextmanager
def _told(what: str, holds: str) -> Iterator[None]:
    """Say what was not written, what is there now, and what to do."""
    try:
        yield
    except Exception as error:
        # As which safetensors and tokenizers tell of a full disk.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        said = f"{what}: {error}. {holds}; mend that, and call train with resume=True"
        raise told_again(error, said) from error


def _saved_already(trainer: Trainer, output_dir: Path) -> bool:
    """Whether the policy after the trainer's present step lies there, as far as the record tells."""
    record = _recorded(output_dir)
    there = record.get("steps_done") == trainer.current_step and record.get("broken_off") is None
    return there and (output_dir / MODEL).is_dir()


def _record(trainer: Trainer, steps: int) -> dict[str, Any]:
    return {
        "steps": max(steps, trainer.current_step),
        "steps_done": trainer.current_step,
        "broken_off": trainer.broken_off,
        "runs": [*trainer.run_log.earlier_runs, trainer.run_log.run_name],
        "kl_coef": trainer.kl_ctl.value,
        "acceleration": attrs.asdict(trainer.acceleration),
        "config": plain_settings(trainer.config),
    }


def _are_weights(file: Path) -> bool:
    """Whether transformers or peft would take a file for a model's, or half of one, beside those that were saved."""
    return _WEIGHTS.fullmatch(file.name) is not None


def _not_a_users_card(file: Path) -> bool:
    return file.name != "README.md" or is_ours(file.parent)
