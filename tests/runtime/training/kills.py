"""SIGKILL at many moments of a tiny run: what is resumed ends in the bits of a run that was left alone.

    python -m tests.runtime.training.kills --kills 50 --inside 20 --ranks 2

Every run is a fork of this process on each rank. It is killed, all ranks of it, and begun again with ``resume=True``
until it ends. Moments are of two kinds: at random times, and, for those inside a save, right before one of the file
operations that the run left alone was seen to make there. Compared are weights, moments, random generators, the saved
model, and the metrics line by line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from datasets import Dataset

from ppo_runtime.common.trees import plain
from ppo_runtime.loop import train
from ppo_runtime.ranks.gather import as_bytes
from ppo_runtime.ranks.shards import here
from ppo_runtime.resuming.position import position
from tests.runtime.support.trainers import make_trainer, untimed

STEPS, EVERY = 6, 2
PATIENCE = 120.0
"""Seconds after which a run that has not ended hangs."""
_OPERATIONS = frozenset({"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"})


@attrs.frozen
class Moment:
    """When a run is killed: some seconds after its directory is there, or before one of a rank's file operations."""

    seconds: float = 0.0
    rank: int = 0
    operation: int | None = None


@attrs.frozen
class Outcome:
    """What a run that has ended leaves to be compared."""

    digests: list[str]
    """Of each rank's weights, moments and generators."""
    model: dict[str, str]
    metrics: list[dict[str, Any]]


def main() -> None:
    """Kill, resume, compare, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.training.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="moments in all")
    parser.add_argument("--inside", type=int, default=20, help="of them inside the save of a checkpoint")
    parser.add_argument("--results", type=int, default=5, help="of them inside the save of the model and the record")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--parallelism", choices=["ddp", "fsdp2"], default="ddp", help="how ranks share the model")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        failures = _all_moments(Path(folder), asked, chance)
    sys.exit(failures != 0)


def _all_moments(folder: Path, asked: argparse.Namespace, chance: random.Random) -> int:
    run = partial(_run, ranks=asked.ranks, parallelism=asked.parallelism)
    run(folder / "straight", record=True)
    duration = time.time() - (folder / "straight" / "began").stat().st_mtime
    straight = _outcome(folder / "straight", asked.ranks)
    operations = [json.loads((folder / "straight" / f"operations-{r}.json").read_text()) for r in range(asked.ranks)]
    all_of_them = [(rank, number) for rank in range(asked.ranks) for number in range(len(operations[rank]))]
    places = [(rank, number) for rank, number in all_of_them if "checkpoint" in operations[rank][number]]
    others = [(0, number) for number, told in enumerate(operations[0]) if "model" in told]
    inside = chance.sample(places, min(asked.inside, len(places)))
    moments = [Moment(rank=rank, operation=number) for rank, number in inside]
    moments += [Moment(rank=rank, operation=number) for rank, number in chance.sample(others, asked.results)]
    moments += [Moment(seconds=chance.uniform(0.0, duration)) for _ in range(asked.kills - len(moments))]
    print(f"{asked.ranks} ranks, {STEPS} steps, a checkpoint every {EVERY}; {duration:.1f} s; {len(places)} operations")
    print(f"{'':>3}  {'killed':62} {'lines':>5}  {'resumed':>7}  same")
    failures = 0
    for number, moment in enumerate(moments, 1):
        home = folder / f"{number}"
        place = operations[moment.rank][moment.operation] if moment.operation is not None else None
        when = f"rank {moment.rank} before {place}" if place else f"after {moment.seconds:.2f} s"
        killed = run(home, moment=moment)
        lines = metrics.read_bytes().count(b"\n") if (metrics := home / "run" / "metrics.jsonl").exists() else 0
        run(home)
        wrong = _differences(straight, _outcome(home, asked.ranks))
        if place and not killed:
            wrong = "not killed"
        failures += bool(wrong)
        print(f"{number:>3}  {when[:62]:62} {lines:>5}  {_resumed(home):>7}  {wrong or 'yes'}", flush=True)
        shutil.rmtree(home)
    print(
        f"{len(moments)} kills, {len(inside)} of them inside the save of a checkpoint and {asked.results} of the "
        f"model: {failures} runs differ"
    )
    return failures


def _run(home: Path, *, ranks: int, parallelism: str, moment: Moment | None = None, record: bool = False) -> bool:
    """One run on all ranks, to its end or its moment; whether it was killed."""
    home.mkdir(exist_ok=True)
    attempt = len(list(home.glob("log-*")))
    (home / f"log-{attempt}").mkdir()
    children: dict[int, int] = {}
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            _in_child(home, attempt, rank, ranks, parallelism, moment, record)
        children[child] = rank
    try:
        return _wait(children, moment, home / f"log-{attempt}")
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _wait(children: dict[int, int], moment: Moment | None, logs: Path) -> bool:
    """True when one was killed or shall be, and with it the others that are left; False when all have ended."""
    started, began = time.monotonic(), logs.parent / "began"
    while children:
        if moment is not None and moment.operation is None and began.exists():
            time.sleep(moment.seconds)
            return True
        if time.monotonic() - started > PATIENCE:
            raise TimeoutError(f"ranks {sorted(children.values())} have not ended")
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.002)
            continue
        rank = children.pop(child)
        if status != 0 and moment is not None and moment.operation is not None:  # or another rank that noticed
            return True
        if status != 0:
            raise RuntimeError(f"rank {rank} has ended with status {status}: {(logs / f'{rank}.txt').read_text()}")
    return False


def _in_child(
    home: Path, attempt: int, rank: int, ranks: int, parallelism: str, moment: Moment | None, record: bool
) -> None:
    """Train, and never return."""
    status = 1
    try:
        log = os.open(home / f"log-{attempt}" / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        if ranks > 1:
            store = f"file://{home / f'log-{attempt}' / 'store'}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        seen: list[str] = []
        _watch(home / "run", seen, moment.operation if moment is not None and moment.rank == rank else None)
        trainer = _train(home / "run", parallelism)
        (home / f"digest-{rank}").write_text(_digest(trainer))
        if record:
            (home / f"operations-{rank}.json").write_text(json.dumps(seen))
        status = 0
    except BaseException:
        logging.exception("failed")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _watch(directory: Path, seen: list[str], strike: int | None) -> None:
    """List the file operations below a directory as they come, and die before one of them."""
    own = str(directory)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS:
            return
        path = _path(arguments)
        if path is None or not path.startswith(own):
            return
        if not seen:
            (directory.parent / "began").touch()
        if len(seen) == strike:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(f"{event} {path[len(own) + 1 :]}")

    sys.addaudithook(hook)


def _path(arguments: tuple[Any, ...]) -> str | None:
    """The whole path of an operation, which may be told beside an open directory, as ``shutil.rmtree`` does."""
    if not isinstance(arguments[0], str | bytes | os.PathLike):
        return None
    path = os.fsdecode(arguments[0])
    numbers = [x for x in arguments[1:] if isinstance(x, int) and not isinstance(x, bool) and x >= 0]
    if not path.startswith("/") and numbers:
        try:
            return f"{os.readlink(f'/proc/self/fd/{numbers[-1]}')}/{path}"
        except OSError:
            return None
    return path


def _train(directory: Path, parallelism: str) -> Any:
    rows = Dataset.from_dict({"query": ["q"] * 24, "input_ids": [[5 + row, 6] for row in range(24)]})
    trainer = make_trainer(
        dataset=rows,
        dropout=0.1,
        batch_size=4,
        mini_batch_size=2,
        ppo_epochs=2,
        horizon=20,
        use_score_scaling=True,
        parallelism=parallelism,
        project_kwargs={"logging_dir": str(directory)},
    )
    train(
        trainer,
        lambda _, texts: [sum(map(ord, text)) % 7 / 7 for text in texts],
        steps=STEPS,
        generation_kwargs={"max_new_tokens": 4},
        output_dir=directory,
        checkpoint_every=EVERY,
        resume=True,
    )
    return trainer


def _digest(trainer: Any) -> str:
    tensors = {f"model.{name}": x for name, x in trainer.model.state_dict().items()}
    rest = [
        plain(trainer.optimizer.state_dict(), "optimizer", tensors),
        plain(trainer.state_dict(), "trainer"),
        plain(position(trainer), "position"),
    ]
    digest = hashlib.sha256(json.dumps(rest).encode())
    for name, x in sorted(tensors.items()):
        digest.update(name.encode() + as_bytes(here(x)).numpy().tobytes())
    return digest.hexdigest()


def _outcome(home: Path, ranks: int) -> Outcome:
    text = (home / "run" / "metrics.jsonl").read_text()
    lines = text.split("\n")
    if lines.pop():
        lines.append("torn")
    return Outcome(
        [(home / f"digest-{rank}").read_text() for rank in range(ranks)],
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (home / "run" / "model").glob("*.safetensors")},
        [_line(line) for line in lines],
    )


def _line(text: str) -> dict[str, Any]:
    try:
        return untimed(json.loads(text))
    except ValueError:
        return {"step": "torn"}


def _differences(expected: Outcome, found: Outcome) -> str:
    steps = [line["step"] for line in found.metrics]
    parts: dict[str, Callable[[], bool]] = {
        "state": lambda: expected.digests == found.digests,
        "model": lambda: expected.model == found.model,
        f"lines {steps}": lambda: steps == list(range(1, STEPS + 1)),
        "metrics": lambda: expected.metrics == found.metrics,
    }
    return ", ".join(f"other {name}" for name, same in parts.items() if not same())


def _resumed(home: Path) -> str:
    """Where the last run went on, by its log."""
    text = max(home.glob("log-*"), key=lambda path: int(path.name.split("-")[1])).joinpath("0.txt").read_text()
    said = [line for line in text.split("\n") if "resumed after step" in line]
    return said[-1].split("step ")[1].split()[0] if said else "anew"


if __name__ == "__main__":
    main()
