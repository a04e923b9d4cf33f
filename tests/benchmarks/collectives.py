"""What a step of several ranks spends in collectives: ``python -m tests.benchmarks.collectives --model DIR``.

The ranks are processes of this machine, which share its processors. Each makes a first step, which is not counted, and
then `--steps` more. "in collectives" is the time from a rank's call of each of them to its end, so that waiting for the
other ranks counts; where several run side by side, or beside a backward pass, a moment counts once. "gradients" are
the bytes that a rank gives to be summed, or gets back whole, in one update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.step.workload import EPOCHS, WORKS, Work, build_trainer, make_batch
from tests.runtime.support.processes import ends_of_ranks

ENGINES = ("ddp", "fsdp2")
_PREFIXES = ("gloo:", "nccl:")


def seconds_in(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans, each from a beginning to an end."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def measure(directory: str, work: Work, engine: str, steps: int) -> dict[str, Any]:
    """Steps of this rank."""
    import ppo_runtime

    settings = {} if engine == "ddp" else {"parallelism": engine}
    trainer = build_trainer(ppo_runtime, directory, work, None, {"dtype": torch.float32}, **settings)
    queries, responses, scores = make_batch(work, trainer.model.config.vocab_size)
    # Other rows on every rank, of the same lengths: only waiting for each other is to be seen, not uneven work.
    rank = trainer.world.rank
    batch = [row.roll(rank) for row in queries], [row.roll(rank) for row in responses], scores
    trainer.step(*batch)
    found: dict[str, Any] = {"seconds": [], "collectives": [], "calls": {}}
    for _ in range(steps):
        trainer.parallel.traffic.calls = trainer.parallel.traffic.bytes = 0
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            trainer.step(*batch)
        found["seconds"].append(time.perf_counter() - started)
        events = [event for event in profiled.events() if event.name.startswith(_PREFIXES)]
        found["collectives"].append(
            seconds_in((event.time_range.start, event.time_range.end) for event in events) / 1e6
        )
        found["calls"] = {name: sum(event.name == name for event in events) for name in {e.name for e in events}}
    updates = EPOCHS * -(-work.batch // work.mini_batch)
    found["gradient_mib"] = trainer.parallel.traffic.bytes / updates / 2**20
    found["trainable_mib"] = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad) / 2**20
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each engine: medians over steps, of the rank that is slowest in collectives."""
    lines = ["engine   step s  in collectives  share  gradients MiB/update  trainable MiB  collectives of a step"]
    for engine, ranks in runs.items():
        step = statistics.median(ranks[0]["seconds"])
        inside = max(statistics.median(rank["collectives"]) for rank in ranks)
        calls = ", ".join(f"{count} {name}" for name, count in sorted(ranks[0]["calls"].items()))
        lines.append(
            f"{engine:6} {step:8.2f} {inside:15.2f} {inside / step:6.1%} {ranks[0]['gradient_mib']:21.1f}"
            f" {ranks[0]['trainable_mib']:14.1f}  {calls}"
        )
    return "\n".join(lines)


def run(model: str, work: str, engine: str, *, ranks: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """What every rank has found."""
    with tempfile.TemporaryDirectory() as folder:
        told = ["--model", model, "--work", work, "--engines", engine, "--steps", steps, "--threads", threads]
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, *map(str, told), "--write", folder]
        for ended in ends_of_ranks(command, ranks=ranks, limit=3600):
            if ended.code:
                raise SystemExit(f"{' '.join(command)} failed:\n{ended.complaint[-4000:]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Measure each engine in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.collectives", description="What a step of several ranks spends in collectives."
    )
    parser.add_argument("--model", required=True, help="model directory, as `convert` writes it")
    parser.add_argument("--work", choices=[name for name, w in WORKS.items() if not w.new_tokens], default="W1")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # a rank's own process
    options = parser.parse_args()
    if options.write:
        torch.set_num_threads(options.threads)
        found = measure(options.model, WORKS[options.work], options.engines[0], options.steps)
        (options.write / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    shared = {"ranks": options.ranks, "steps": options.steps, "threads": options.threads}
    print(table({engine: run(options.model, options.work, engine, **shared) for engine in options.engines}))


if __name__ == "__main__":
    main()
