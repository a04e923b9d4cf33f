"""A picture of a run: score, KL and losses over its steps."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

from ppo_runtime.common.extras import require
from ppo_runtime.common.files import write_whole

_SCORE = "ppo/mean_scores"
_BLUE, _ORANGE, _GREY = "#2a6fb0", "#d9702b", "#808080"


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
    require("matplotlib", extra="plot", wanted_by="plot_curves")
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
        highest = max(filter(math.isfinite, curve("objective/kl_coef")), default=0.0)
        coefficient.set_ylim(0.0, 1.2 * highest or 1.0)
        _finish(kl, "KL", "nats per response", coefficient)

        for name, color in {"policy": _BLUE, "value": _ORANGE, "total": _GREY}.items():
            loss.plot(steps, curve(f"ppo/loss/{name}"), color=color, label=name)
        _finish(loss, "Losses", "loss")
        loss.set_xlabel("step")
        loss.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture = BytesIO()
        figure.savefig(picture, format="png")
        write_whole(Path(path), picture.getvalue())


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
