"""How far the run in an output directory has come, and whether another call may go on there."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ppo_runtime.checkpoint import newest_good, steps_done
from ppo_runtime.demo.options import DemoOptions, has_begun


def finished(options: DemoOptions, console: Console) -> dict[str, Any] | None:
    """The report of a run that has made all its steps, and the way to more of them; None if it has not."""
    path, done = options.output / "report.json", steps_made(options.output)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not written yet, or torn: it will be
        return None
    reported = report.get("steps") if isinstance(report, dict) else None
    if not isinstance(reported, int) or isinstance(reported, bool) or done < options.steps or reported < done:
        return None
    console.print(
        Text(
            f"The run in {options.output} is finished, after step {done}. For more steps: "
            f"--resume --output {options.output} --steps {done + options.steps}"
        )
    )
    return report


def steps_made(output: Path) -> int:
    """The steps of the newest whole checkpoint in a directory."""
    newest = newest_good(output)
    return 0 if newest is None else steps_done(newest) or 0


def check_output(output: Path, *, resume: bool) -> None:
    """Refuse an output directory that cannot be written or made; a second run never mixes with a first by accident.

    Nothing is made here, so that a call that is refused later leaves nothing behind. A run that was killed before its
    first checkpoint has left its options, and begins again with them.
    """
    ground = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not ground.is_dir():
        raise NotADirectoryError(f"output is {output}, expected a directory: {ground} is a file")
    if not os.access(ground, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output is {output}, expected a directory that can be made and written: {ground} cannot "
            "be written; choose another with --output"
        )
    resumable = has_begun(output) or steps_made(output) > 0
    empty = not output.exists() or not any(output.iterdir())
    if resume and not resumable:
        left = "; start without --resume" if empty else ", only other files; choose another with --output, or remove it"
        raise FileNotFoundError(f"output {output} holds no run to resume{left}")
    if not resume and not empty:
        onwards = f", or go on with its run: --resume --output {output}" if resumable else ""
        raise FileExistsError(f"output {output} is not empty; choose another with --output, or remove it{onwards}")
