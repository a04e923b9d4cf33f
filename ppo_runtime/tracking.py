"""Where metrics go: a JSONL file always, TensorBoard or Weights & Biases by choice, and a picture of the curves.

Only rank 0 tracks. The JSONL file is the record: one object per step, readable after any crash and without this
package.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

Scalars = Mapping[str, float]
Table = Sequence[Mapping[str, object]]
"""Rows, such as a prompt, its response and the reward."""

_RESERVED = ("step", "tables", "nonfinite")
_SCORE = "ppo/mean_scores"
_BLUE, _ORANGE, _GREY = "#2a6fb0", "#d9702b", "#808080"


class Tracker(Protocol):
    """Anything that takes the metrics of a step."""

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Record one step."""
        ...

    def close(self) -> None:
        """Write out what is left; nothing is logged afterwards."""
        ...


class JsonlTracker:
    """One JSON object per line and step: ``{"step": 3, "ppo/loss/total": 0.1, ..., "tables": {...}}``.

    JSON has no NaN or infinity: such a value is written as null and its key listed under ``"nonfinite"``. An existing
    file is continued, after the half-written last line that a crash may have left is cut off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Append one line and flush it."""
        if taken := [key for key in _RESERVED if key in scalars]:
            raise ValueError(f"scalars has the key {taken[0]!r}, which the file uses itself; rename that metric")
        nonfinite: list[str] = []
        line: dict[str, object] = {"step": step}
        line |= {key: _finite(value, key, nonfinite) for key, value in scalars.items()}
        if tables:
            line["tables"] = {
                name: [{key: _finite(cell, f"{name}/{key}", nonfinite) for key, cell in row.items()} for row in table]
                for name, table in tables.items()
            }
        if nonfinite:
            line["nonfinite"] = sorted(set(nonfinite))
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
        _require("tensorboard", extra="tensorboard", wanted_by="log_with='tensorboard'")
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(**{"log_dir": os.fspath(directory), **kwargs})

    def log(self, step: int, scalars: Scalars, tables: Mapping[str, Table]) -> None:
        """Add the step to every curve."""
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)
        for name, table in tables.items():
            self._writer.add_text(name, _markdown(table), step)
        self._writer.flush()

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run. Keyword arguments go to ``wandb.init``; WANDB_MODE=offline is respected."""

    def __init__(
        self, project: str, directory: str | os.PathLike[str], config: Mapping[str, object], **kwargs: Any
    ) -> None:
        self._wandb = _require("wandb", extra="wandb", wanted_by="log_with='wandb'")
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

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def make_trackers(
    log_with: Literal["tensorboard", "wandb"] | None,
    directory: str | os.PathLike[str],
    tracker_kwargs: Mapping[str, Any],
    project_name: str,
    config_dict: Mapping[str, object],
) -> list[Tracker]:
    """``metrics.jsonl`` in the directory and, beside it, what ``log_with`` names. To be called on rank 0 only.

    Args:
        log_with: another tracker, if any.
        directory: of the run; made if it does not exist.
        tracker_kwargs: for that tracker, plain or (as accelerate has it) under its name.
        project_name: of the Weights & Biases project.
        config_dict: the run's settings, kept with a Weights & Biases run.

    Raises:
        ValueError: ``log_with`` is unknown.
        ImportError: its package is missing; the message names the extra to install.
    """
    makers: dict[str | None, Callable[..., list[Tracker]]] = {
        None: lambda **_: [],
        "tensorboard": lambda **kwargs: [TensorBoardTracker(directory, **kwargs)],
        "wandb": lambda **kwargs: [WandbTracker(project_name, directory, config_dict, **kwargs)],
    }
    if log_with not in makers:
        raise ValueError(f"log_with is {log_with!r}, expected one of {', '.join(map(repr, makers))}")
    chosen = makers[log_with](**tracker_kwargs.get(str(log_with), tracker_kwargs))
    return [JsonlTracker(Path(directory) / "metrics.jsonl"), *chosen]


def plot_curves(
    metrics: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    title: str,
    *,
    kl_target: float | None = None,
) -> None:
    """Draw a run's score, KL and losses over its steps as a PNG.

    Args:
        metrics: as :func:`read_jsonl` gives them. Of a step that was run twice, after a resume, the later one counts.
        path: of the picture; its directory is made.
        title: above the picture.
        kl_target: of the adaptive controller, drawn as a line.

    Raises:
        ValueError: there is no line with a score.
        ImportError: matplotlib is missing.
    """
    _require("matplotlib", extra="plot", wanted_by="plot_curves")
    from matplotlib.figure import Figure  # without pyplot: no window, no global state, always Agg for a PNG

    by_step = {int(line["step"]): line for line in metrics if _SCORE in line}
    if not by_step:
        raise ValueError(f"metrics has no line with {_SCORE!r}, expected at least one step; train before plotting")
    steps = sorted(by_step)

    def curve(key: str) -> list[float]:
        return [math.nan if (value := by_step[step].get(key)) is None else value for step in steps]

    with _style(marker="." if len(steps) < 20 else ""):
        figure = Figure(figsize=(8, 8), dpi=150, layout="constrained")
        figure.suptitle(title + "\n", fontweight="bold")
        score, kl, loss = figure.subplots(3, 1, sharex=True)
        window = max(5, len(steps) // 20)
        score.plot(steps, curve(_SCORE), ".", color=_BLUE, alpha=0.35, label="each step")
        score.plot(steps, _running_mean(curve(_SCORE), window), color=_BLUE, label=f"mean of the last {window}")
        _finish(score, "Score", "mean score")

        kl.plot(steps, curve("objective/kl"), color=_BLUE, label="KL to the reference")
        if kl_target is not None:
            kl.axhline(kl_target, color=_GREY, linestyle="--", linewidth=1.2, marker="", label=f"target {kl_target:g}")
        coefficient = kl.twinx()
        coefficient.plot(steps, curve("objective/kl_coef"), color=_ORANGE, label="coefficient (right)")
        coefficient.set_ylabel("coefficient", color=_ORANGE)
        coefficient.tick_params(axis="y", colors=_ORANGE)
        coefficient.grid(visible=False)
        kl.set_ylim(bottom=min(0.0, kl.get_ylim()[0]))
        coefficient.set_ylim(0.0, 1.2 * coefficient.dataLim.y1 or 1.0)
        _finish(kl, "KL", "nats per response", coefficient)

        for name, color in {"policy": _BLUE, "value": _ORANGE, "total": _GREY}.items():
            loss.plot(steps, curve(f"ppo/loss/{name}"), color=color, label=name)
        _finish(loss, "Losses", "loss")
        loss.set_xlabel("step")
        loss.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values, as far as they are there and finite."""
    parts = ([x for x in values[max(0, end - window) : end] if math.isfinite(x)] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) if part else math.nan for part in parts]


def _style(*, marker: str) -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _GREY,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "lines.linewidth": 1.5,
            "lines.markersize": 5,
            "lines.marker": marker,  # a line through one point is invisible
        }
    )


def _finish(axes: Any, title: str, unit: str, *others: Any) -> None:
    """Title on the left and legend on the right above the panel, where neither can hide a curve."""
    handles, labels = axes.get_legend_handles_labels()
    for other in others:
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(unit)
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(labels), frameon=False, borderpad=0.2
    )


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


def _require(package: str, *, extra: str, wanted_by: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"{wanted_by} needs the package {package}, which is not installed; pip install 'ppo-core[{extra}]'"
        ) from error
