"""Where metrics go: a JSONL file always, TensorBoard or Weights & Biases by choice. Only rank 0 tracks."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ppo_runtime.common.extras import require
from ppo_runtime.config import TrackerName
from ppo_runtime.reporting.jsonl import JsonlTracker, run_at, set_aside, set_aside_after
from ppo_runtime.reporting.tables import Table

logger = logging.getLogger(__name__)

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """Anything that takes the metrics of a step."""

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Record one step."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Write out what is left; nothing is logged afterwards. ``failed``: an error has ended the run."""
        ...


class TensorBoardTracker:
    """Scalars as curves, tables as text. Keyword arguments go to ``SummaryWriter``."""

    def __init__(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:
        require("tensorboard", extra="tensorboard", wanted_by="log_with='tensorboard'")
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(**{"log_dir": os.fspath(directory), **kwargs})

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Add the step to every curve."""
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)
        for name, table in tables.items():
            self._writer.add_text(name, _markdown(table), step)
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """Write out and close."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run. Keyword arguments go to ``wandb.init``; WANDB_MODE=offline is respected."""

    def __init__(
        self, project: str, directory: str | os.PathLike[str], config: Mapping[str, object], **kwargs: Any
    ) -> None:
        self._wandb = require("wandb", extra="wandb", wanted_by="log_with='wandb'")
        Path(directory).mkdir(parents=True, exist_ok=True)
        settings = {"project": project, "dir": os.fspath(directory), "config": dict(config), **kwargs}
        self._run = self._wandb.init(**settings)

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Send one step."""
        drawn = {
            name: self._wandb.Table(columns=_columns(table), data=[[*_cells(row, _columns(table))] for row in table])
            for name, table in tables.items()
        }
        self._run.log({**scalars, **drawn}, step=step)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run, as a crashed one if it has failed."""
        if failed:
            self._run.finish(exit_code=1)
        else:
            self._run.finish()


def make_trackers(
    log_with: TrackerName | None,
    directory: str | os.PathLike[str],
    tracker_kwargs: Mapping[str, Any],
    project_name: str,
    config_dict: Mapping[str, object],
    *,
    goes_on_after: float | None = None,
    run: str | None = None,
    earlier: Sequence[str | None] = (),
) -> list[Tracker]:
    """``metrics.jsonl`` in the directory and, beside it, what ``log_with`` names. To be called on rank 0 only.

    The file is one run's. What an earlier run left there moves to a file of its own, ``metrics-1.jsonl``.

    Args:
        log_with: another tracker, if any.
        directory: of the run; made if it does not exist.
        tracker_kwargs: for that tracker, plain or (as accelerate has it) under its name.
        project_name: of the Weights & Biases project.
        config_dict: the run's settings, kept with a Weights & Biases run.
        goes_on_after: the step after which the run in this directory goes on; lines of later ones move to a file of
            their own, since those steps are made again. None begins a run.
        run: the name that this part of the run goes by.
        earlier: the names of its earlier parts; a file whose lines up to that step end with another one's is moved.

    Raises:
        ValueError: ``log_with`` is unknown.
        ImportError: its package is missing; the message names the extra to install.
    """
    makers: dict[str | None, Callable[..., list[Tracker]]] = {
        None: lambda **_: [],
        "tensorboard": lambda **kwargs: [TensorBoardTracker(directory, **{**_purged(goes_on_after), **kwargs})],
        "wandb": lambda **kwargs: [WandbTracker(project_name, directory, config_dict, **kwargs)],
    }
    if log_with not in makers:
        raise ValueError(f"log_with is {log_with!r}, expected one of {', '.join(map(repr, makers))}")
    metrics = Path(directory) / "metrics.jsonl"
    if goes_on_after is not None and run_at(metrics, goes_on_after) not in (run, *earlier):
        goes_on_after = None  # nothing that lies there is this run's
    named = any(isinstance(tracker_kwargs.get(name), Mapping) for name in makers if name is not None)
    chosen = makers[log_with](**(tracker_kwargs.get(str(log_with), {}) if named else tracker_kwargs))
    aside = set_aside(metrics) if goes_on_after is None else set_aside_after(metrics, goes_on_after)
    if aside is not None and goes_on_after is None:
        logger.info("metrics of an earlier run in %s are in %s now", metrics.parent, aside.name)
    elif aside is not None:
        logger.info(
            "%s: the lines after step %d are in %s now; those steps are made again", metrics, goes_on_after, aside.name
        )
    return [JsonlTracker(metrics, run), *chosen]


def _purged(step: float | None) -> dict[str, int]:
    """What has TensorBoard forget the curves beyond a step."""
    return {} if step is None or math.isinf(step) else {"purge_step": int(step) + 1}


def _columns(table: Table) -> list[str]:
    """The keys of all rows in the order they appear."""
    return list(dict.fromkeys(key for row in table for key in row))


def _cells(row: Mapping[str, object], columns: list[str]) -> list[object]:
    return [row.get(column, "") for column in columns]


def _markdown(table: Table) -> str:
    columns = _columns(table)
    rows = [columns, ["---"] * len(columns), *(_cells(row, columns) for row in table)]
    return "\n".join("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in rows)


def _markdown_cell(cell: object) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", "<br>")
