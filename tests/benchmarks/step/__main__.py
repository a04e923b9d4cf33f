"""Measure steps and generation against a peer: ``python -m tests.benchmarks.step --model DIR [--peer PYTHON]``.

The sides take turns, each run in a process of its own, one after the other. See the package's docstring for the peer's
environment and :mod:`.flops` for what efficiency is measured against. W1: 8 rows of up to 48 response tokens; W2: 16
of up to 128; W3: as W2, with 24 layers shared and frozen; W4: 48 tokens for 16 prompts, by the default call of
`generate` and 16 at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from . import older, sameness, table
from .worker import OPTIMISERS
from .workload import WORKS

HERE = Path(__file__).parent
QUIET = 0.5
"""Load below which a machine counts as quiet."""


def run_worker(python: str, threads: int, *arguments: object) -> dict[str, Any]:
    """What one worker has printed, and the load before and after it."""
    environment = os.environ | {
        # Ours is found beside the tests; the peer shall find nothing of it.
        "PYTHONPATH": "" if table.PEER in arguments else str(HERE.parents[2]),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = os.getloadavg()[0]
    command = [python, "-m", f"{HERE.name}.worker", "--threads", str(threads), *map(str, arguments)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {HERE.parent} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load": [before, os.getloadavg()[0]]}


def measure(sides: dict[str, tuple[str, ...]], options: argparse.Namespace) -> list[table.Run]:
    """Every workload, as often as asked for, the sides taking turns; the JSON is written after each run."""
    runs: list[table.Run] = []
    for work in options.only:
        for turn in range(options.runs):
            for side, (python, model) in sides.items():
                more = ("--accel", options.accel) if side == table.OURS else ()
                # Once is enough, and behind what is measured.
                more += ("--profile",) if side == table.OURS and turn == 0 else ()
                found = run_worker(python, options.threads, "--side", side, "--model", model, "--work", work, *more)
                runs.append({"work": work, "side": side, "turn": turn} | found)
                print(table.progress(runs[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return runs


def compare(sides: dict[str, tuple[str, ...]], threads: int, folder: Path) -> None:
    """Print how far apart both sides are after the same step."""
    for optimiser in OPTIMISERS:
        found: dict[str, dict[str, Any]] = {}
        for side, (python, model) in sides.items():
            told = ("--same", optimiser, "--weights", folder / f"{side}.pt")
            found[side] = run_worker(python, threads, "--side", side, "--model", model, "--work", "W1", *told)
        weights = [torch.load(folder / f"{side}.pt", weights_only=True) for side in (table.OURS, table.PEER)]
        shown = sameness.render(optimiser, found[table.OURS], found[table.PEER], sameness.distance(*weights))
        print(shown, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per run and the table, or how far apart the sides are."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.step", description="Measure steps and generation, ours beside a peer's."
    )
    parser.add_argument("--model", type=Path, required=True, help="model directory, as `convert` writes it")
    parser.add_argument("--peer", metavar="PYTHON", help="the peer's interpreter; left out: ours alone")
    parser.add_argument(
        "--peer-model", type=Path, metavar="DIR", help="a copy of --model for the peer; made if left out"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment that ours shall run in")
    parser.add_argument("--accel", default="auto", help="PPOConfig's accel, for ours (default auto)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="W1", help="workloads")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all processors)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs to this file")
    parser.add_argument(
        "--same", action="store_true", help="compare losses and weights of one step, and measure nothing"
    )
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args(arguments)
    if options.same and not options.peer:
        parser.error("--same compares with a peer: pass --peer")
    load = os.getloadavg()[0]
    if load > QUIET and not (options.busy or options.same):
        parser.error(f"the load is {load:.2f}, above {QUIET}: wait until the machine is quiet, or pass --busy")
    with ExitStack() as stack:
        # Links are absolute, and the workers start elsewhere.
        sides = {table.OURS: (options.python, str(options.model.resolve()))}
        if options.peer:
            theirs = options.peer_model
            if theirs is None:
                theirs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                older.view(options.model, theirs)
            peer = options.peer if os.sep not in options.peer else os.path.abspath(options.peer)
            sides[table.PEER] = (peer, str(theirs.resolve()))
        if options.same:
            compare(sides, options.threads, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            return
        busy = f", BUSY: above {QUIET}" if load > QUIET else ""
        print(f"{options.threads} threads, load {load:.2f}{busy}", flush=True)
        runs = measure(sides, options)
    print(f"\n{table.render(runs)}")


if __name__ == "__main__":
    main()
