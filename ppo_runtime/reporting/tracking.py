"""Where metrics go: a JSONL file always, TensorBoard or Weights & Biases by choice.

Only rank 0 tracks. The JSONL file is the record: one object per step, readable after any crash and without this
package.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

from ppo_runtime.common.extras import require
from ppo_runtime.common.files import write_whole

logger = logging.getLogger(__name__)

Scalars = Mapping[str, float]
Table = Sequence[Mapping[str, object]]
"""Rows, such as a prompt, its response and the reward."""

_RESERVED = ("step", "tables", "nonfinite", "run")


class Tracker(Protocol):
    """Anything that takes the metrics of a step."""

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Record one step."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Write out what is left; nothing is logged afterwards. ``failed``: an error has ended the run."""
        ...


class JsonlTracker:
    """One JSON object per line and step: ``{"step": 3, "ppo/loss/total": 0.1, ..., "tables": {...}}``.

    JSON has no NaN or infinity: such a value is written as null and its key listed under ``"nonfinite"``. An existing
    file is continued, after the half-written last line that a crash may have left is cut off. The first line that a run
    with a name writes says it, and so whose the lines behind it are.
    """

    def __init__(self, path: str | os.PathLike[str], run: str | None = None) -> None:
        self.run = run
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)
        self._named = _run_at(content, math.inf)

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Append one line and flush it."""
        if taken := [key for key in _RESERVED if key in scalars]:
            raise ValueError(f"scalars has the key {taken[0]!r}, which the file uses itself; rename that metric")
        nonfinite: list[str] = []
        line: dict[str, object] = {"step": step}
        if self.run not in (None, self._named):
            line["run"] = self.run
        line |= {key: _finite(value, key, nonfinite) for key, value in scalars.items()}
        if tables:
            line["tables"] = {
                name: [{key: _finite(cell, f"{name}/{key}", nonfinite) for key, cell in row.items()} for row in table]
                for name, table in tables.items()
            }
        if nonfinite:
            line["nonfinite"] = sorted(set(nonfinite))
        self._file.write(
            json.dumps(line, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
        )
        self._file.flush()
        self._named = self.run

    def close(self, *, failed: bool = False) -> None:
        """Close the file, whose last line says how far the run came."""
        self._file.close()


def set_aside(path: str | os.PathLike[str]) -> Path | None:
    """Move an earlier run's lines to ``metrics-1.jsonl``, or the next number; returns that path, None without lines."""
    path = Path(path)
    if not path.exists() or b"\n" not in path.read_bytes():
        return None
    return path.rename(_beside(path))


def set_aside_after(path: str | os.PathLike[str], step: float) -> Path | None:
    """Move the lines of later steps, which a run that goes on from ``step`` makes again, as :func:`set_aside` does.

    They are kept, since they may be of another branch of the run, which went on from a copy of the checkpoint.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    later = [line for line in lines if _later(line, step)]
    if not later:
        return None
    write_whole(aside := _beside(path), b"".join(later))
    write_whole(path, b"".join(line for line in lines if not _later(line, step)))
    return aside


def _beside(path: Path) -> Path:
    """A name that is free: ``metrics-1.jsonl``, or the next number."""
    number = next(n for n in count(1) if not path.with_name(f"{path.stem}-{n}{path.suffix}").exists())
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a :class:`JsonlTracker`; a half-written last one is dropped.

    Raises:
        ValueError: another line is not JSON; the message names it.
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:  # noqa: PERF203  # the line number belongs into the message
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}), expected one object per line; repair or delete the line"
            ) from error
    return records


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
    log_with: Literal["tensorboard", "wandb"] | None,
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
    if goes_on_after is not None and _run_at(_content(metrics), goes_on_after) not in (run, *earlier):
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


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _run_at(content: bytes, step: float) -> str | None:
    """The name of the run whose line the one of this step is, or the last one before it; None without a name."""
    records = [record for record in map(_record, content.split(b"\n")) if record]
    name = records[0].get("run") if records else None
    for record in records:
        if isinstance(number := record.get("step"), int) and number <= step:
            name = record.get("run", name)
    return name


def _purged(step: float | None) -> dict[str, int]:
    """What has TensorBoard forget the curves beyond a step."""
    return {} if step is None or math.isinf(step) else {"purge_step": int(step) + 1}


def _later(line: bytes, step: float) -> bool:
    return isinstance(number := _record(line).get("step"), int) and number > step


def _record(line: bytes) -> dict[str, Any]:
    """What a line holds; nothing if it is no record, which read_jsonl names."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _finite(value: Any, key: str, nonfinite: list[str]) -> Any:
    """The value as JSON can hold it; ``key`` joins ``nonfinite`` if it can't."""
    if isinstance(value, str | bool | int | None):
        return value
    if hasattr(value, "__float__"):
        number = float(value)
        if math.isfinite(number):
            return number
        nonfinite.append(key)
        return None
    return str(value)


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
