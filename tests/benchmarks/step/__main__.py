"""Measure steps and generation against a peer: ``python -m tests.benchmarks.step --model DIR [--peer PYTHON]``.

The sides take turns, each run in a process of its own, one after the other. See the package's docstring for the peer's
environment and :mod:`.flops` for what efficiency is measured against. In place of a peer, `--eager` takes ours in eager
torch, which says what another backend is worth.

W1: 8 rows of up to 48 response tokens; W2: 16 of up to 128; W3: as W2, with 24 layers shared and frozen; W4: 48 tokens
for 16 prompts, by the default call of `generate` and 16 at a time.
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
from typing import Any, NamedTuple

import torch

from . import older, sameness, table
from .worker import OPTIMISERS
from .workload import WORKS

HERE = Path(__file__).parent
QUIET = 0.5
"""Load below which a machine counts as quiet."""


class Side(NamedTuple):
    """How a worker of one side is started."""

    python: str
    model: str
    module: str
    accel: str


def run_worker(side: Side, threads: int, *arguments: object) -> dict[str, Any]:
    """What one worker has printed, and the load before and after it."""
    environment = os.environ | {
        # Ours is found beside the tests; the peer shall find nothing of it.
        "PYTHONPATH": "" if side.module == table.PEER else str(HERE.parents[2]),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = os.getloadavg()[0]
    told = ("--side", side.module, "--model", side.model, "--accel", side.accel, "--threads", threads, *arguments)
    command = [side.python, "-m", f"{HERE.name}.worker", *map(str, told)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {HERE.parent} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load": [before, os.getloadavg()[0]]}


def measure(sides: dict[str, Side], options: argparse.Namespace) -> list[table.Run]:
    """Every workload, as often as asked for, the sides taking turns; the JSON is written after each run."""
    runs: list[table.Run] = []
    for work in options.only:
        for turn in range(options.runs):
            for name, side in sides.items():
                # Once is enough, and behind what is measured.
                more = ("--profile",) if name == table.OURS and turn == 0 else ()
                found = run_worker(side, options.threads, "--work", work, *more)
                runs.append({"work": work, "side": name, "turn": turn} | found)
                print(table.progress(runs[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    return runs


def compare(sides: dict[str, Side], threads: int, folder: Path) -> None:
    """Print how far apart both sides are after the same step."""
    for optimiser in OPTIMISERS:
        found: dict[str, dict[str, Any]] = {}
        for name, side in sides.items():
            file = folder / f"{name}.pt"
            found[name] = run_worker(side, threads, "--work", "W1", "--same", optimiser, "--weights", file)
        weights = [torch.load(folder / f"{name}.pt", weights_only=True) for name in (table.OURS, table.PEER)]
        shown = sameness.render(optimiser, found[table.OURS], found[table.PEER], sameness.distance(*weights))
        print(shown, flush=True)


def _from_anywhere(python: str) -> str:
    """An interpreter's path that holds in another folder; a link stays, since it says which environment is meant."""
    return os.path.abspath(python) if os.sep in python else python


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per run and the table, or how far apart the sides are."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.step", description="Measure steps and generation, ours beside a peer's."
    )
    parser.add_argument("--model", type=Path, required=True, help="model directory, as `convert` writes it")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--peer", metavar="PYTHON", help="the peer's interpreter; left out: ours alone")
    others.add_argument("--eager", action="store_true", help="compare with ours in eager torch")
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
        ours = Side(_from_anywhere(options.python), str(options.model.resolve()), table.OURS, options.accel)
        sides = {table.OURS: ours}
        if options.eager:
            sides[table.EAGER] = ours._replace(accel="eager")
        if options.peer:
            theirs = options.peer_model
            if theirs is None:
                theirs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                older.view(options.model, theirs)
            sides[table.PEER] = Side(_from_anywhere(options.peer), str(theirs.resolve()), table.PEER, "eager")
        if options.same:
            compare(sides, options.threads, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            return
        busy = f", BUSY: above {QUIET}" if load > QUIET else ""
        print(f"{options.threads} threads, load {load:.2f}{busy}", flush=True)
        runs = measure(sides, options)
    print(f"\n{table.render(runs)}")


if __name__ == "__main__":
    main()
