"""Medians, ratios and efficiency of many runs, as rows and as text; a run is one worker's JSON and what was asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

OURS, PEER, EAGER = "ours", "peer", "eager"
"""Sides: ours, and what it is compared with, a peer or ours without what `--accel` has chosen."""
Run = dict[str, Any]


class Side(NamedTuple):
    """Medians of one side's runs of one call."""

    seconds: float
    mib: float
    of_mm: float
    """Needed FLOPs / (seconds x the rate of torch.mm in the same process)."""
    of_limit: float
    """The same with the fastest product that was found there; 1 is the machine's limit."""


class Row(NamedTuple):
    """One measured call on both sides; ``other`` is None where there is none."""

    work: str
    call: str
    ours: Side
    other: Side | None


def efficiency(run: Run, call: str, needed_flops: float, ways: Iterable[str]) -> float:
    """Of one run, by the fastest of these products before and after it."""
    rate = max(mean(run["product_gflops"][way]) for way in ways)
    return needed_flops / (rate * 1e9 * run["seconds"][call])


def summary(runs: Sequence[Run]) -> list[Row]:
    """A row for each call of each workload that ours has finished, in the order of the runs."""
    calls = dict.fromkeys((run["work"], call) for run in runs for call in run["seconds"])
    return [row for work, call in calls if (row := _row(runs, work, call)) is not None]


def _row(runs: Sequence[Run], work: str, call: str) -> Row | None:
    same = [run for run in runs if run["work"] == work and call in run["seconds"]]
    mine, theirs = ([r for r in same if r["side"] == OURS], [r for r in same if r["side"] != OURS])
    if not mine:
        return None
    # What is needed depends on workload and model, which both sides have in common.
    needed = mine[0]["needed_flops"]
    ours, other = (
        Side(
            median(run["seconds"][call] for run in side),
            median(run["peak_mib"][call] for run in side),
            median(efficiency(run, call, needed, ["mm"]) for run in side),
            median(efficiency(run, call, needed, run["product_gflops"]) for run in side),
        )
        if side
        else None
        for side in (mine, theirs)
    )
    assert ours is not None
    return Row(work, call, ours, other)


def render(runs: Sequence[Run]) -> str:
    """The table, and below it where a step of ours goes."""
    name = next((run["side"] for run in runs if run["side"] != OURS), PEER)
    columns = ("ours s", f"{name} s", "ratio", "ours MiB", f"{name} MiB", "ratio")
    columns += ("ours of torch.mm", f"{name} of torch.mm", "ours of limit")
    lines = [("work", *columns), *(_cells(row) for row in summary(runs))]
    text = [f"Medians. Ratios: seconds of {name} / ours, memory of ours / {name}.", *_aligned(lines)]
    if profiled := {run["work"]: run["parts"] for run in runs if "parts" in run}:
        parts = list(dict.fromkeys(part for each in profiled.values() for part in each))
        lines = [("one step of ours, s", *parts, "sum")]
        for work, seconds in profiled.items():
            lines.append((work, *(f"{seconds.get(part, 0.0):.2f}" for part in parts), f"{sum(seconds.values()):.2f}"))
        text += ["", *_aligned(lines)]
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    ours, other = row.ours, row.other
    return (
        f"{row.work} {row.call}",
        f"{ours.seconds:.2f}",
        "-" if other is None else f"{other.seconds:.2f}",
        "-" if other is None else f"{other.seconds / ours.seconds:.2f}x",
        f"{ours.mib:.0f}",
        "-" if other is None else f"{other.mib:.0f}",
        "-" if other is None else f"{ours.mib / other.mib:.2f}",
        f"{ours.of_mm:.2f}",
        "-" if other is None else f"{other.of_mm:.2f}",
        f"{ours.of_limit:.2f}",
    )


def _aligned(lines: Sequence[Iterable[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in zip(*columns, strict=True)
    ]


def progress(run: Run) -> str:
    """One line about one run."""
    calls = ", ".join(
        f"{call} {seconds:.2f} s {run['peak_mib'][call]:.0f} MiB" for call, seconds in run["seconds"].items()
    )
    rates = ", ".join(f"{way} {first:.0f} -> {last:.0f}" for way, (first, last) in run["product_gflops"].items())
    before, after = run["load"]
    return f"{run['work']} {run['side']} ({run['backend']}): {calls}; {rates} GFLOP/s; load {before:.2f} -> {after:.2f}"
