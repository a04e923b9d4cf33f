"""Each field of a checkpoint's records replaced by what it may not be: refused before anything changes, or harmless.

The manifest is made anew each time, so that it is the field itself that is looked at. As a script, the same of every
value however deep: ``python -m tests.runtime.training.test_checkpoint_records``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.ranks.gather import as_bytes
from ppo_runtime.resuming import files
from tests.runtime.support.sealing import seal_again
from tests.runtime.support.trainers import make_batch, make_trainer
from tests.runtime.training.test_checkpoint_misfits import OPTIMIZERS

MISSING = object()
VALUES: dict[str, Any] = {
    "null": None,
    "a text": "surprise",
    "-1": -1,
    "huge": 10**400,
    "beyond float32": 1e300,
    "nan": float("nan"),
    "inf": float("inf"),
    "a list": [],
    "a dictionary": {},
    "missing": MISSING,
}
SCHEDULERS = torch.optim.lr_scheduler
# Values that are as good as what was there: labels, and what is nothing to anybody else's run.
FREE = {
    ("run",): {"null", "a text"},
    ("earlier_runs",): {"a list"},
    ("trainer", "best_score"): {"null", "-1"},
    ("optimizer_made_of",): {"null"},
    ("frozen_buffers",): {"null"},
    ("prompts",): {"null"},
    ("cuda",): {"null", "a list"},
    ("device",): {"null"},
    ("cuda_device",): {"null"},
    ("data",): {"null"},  # of a dataloader of somebody's own
    ("python", "tuple", 2): {"-1"},
    ("trainer", "scores", "mean"): {"-1"},
    ("trainer", "scores", "m2"): {"beyond float32"},
    ("config", "init_kl_coef"): {"beyond float32"},
}


def make(kind: str) -> PPOTrainer:
    rows = [{"input_ids": [5 + row] * (1 + row % 3)} for row in range(12)]
    trainer = make_trainer(optimizer_of=OPTIMIZERS[kind], dataset=rows, use_score_scaling=True)
    trainer.lr_scheduler = SCHEDULERS.SequentialLR(
        trainer.optimizer,
        [SCHEDULERS.LinearLR(trainer.optimizer), SCHEDULERS.CosineAnnealingLR(trainer.optimizer, T_max=10)],
        [2],
    )
    return trainer


def fields(
    tree: Any, depth: int, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Callable[[Any], None]]]:
    """Every field of a tree of plain values as its path, and what puts another value there or takes it out."""

    def in_place(container: Any, key: Any) -> Callable[[Any], None]:
        def put(value: Any) -> None:
            if value is MISSING:
                del container[key]
            else:
                container[key] = copy.copy(value)

        return put

    def in_pair(pairs: list[Any], index: int) -> Callable[[Any], None]:
        return lambda value: in_place(pairs, index)(MISSING) if value is MISSING else in_place(pairs[index], 1)(value)

    if not depth:
        return
    if isinstance(tree, dict) and tree.keys() <= {"dict", "counter"}:
        for pairs in tree.values():
            for index, (name, value) in enumerate(pairs):
                if isinstance(name, int) and name > 1:  # one parameter is like another
                    continue
                yield (*path, name), in_pair(pairs, index)
                yield from fields(value, depth - 1, (*path, name))
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:3]):
            if path == ("config",) and key not in ("batch_size", "init_kl_coef", "learning_rate", "seed", "gamma"):
                continue  # what only a warning is made of
            yield (*path, key), in_place(tree, key)
            yield from fields(value, depth - 1, (*path, key))


def told(trainer: PPOTrainer) -> tuple[str, ...]:
    """All that loading changes, but for the name of the new part of the run."""
    optimizer, scheduler = trainer.optimizer.state_dict(), trainer.lr_scheduler
    tensors = dict(trainer.model.state_dict())
    for place, held in optimizer["state"].items():
        tensors |= {f"{place} {name}": torch.as_tensor(value) for name, value in held.items()}
    generators = trainer.shuffle.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  the generator that checkpoints hold
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + as_bytes(tensor).numpy().tobytes())
    digest.update(b"".join(state.numpy().tobytes() for state in generators[:2]) + str(generators[2:]).encode())
    batches: Any = trainer.dataloader and trainer.dataloader.batch_sampler
    return (
        digest.hexdigest(),
        str([sorted(group.items()) for group in optimizer["param_groups"]]),
        str(scheduler.state_dict()),
        str(trainer.state_dict()),
        str(batches.state_dict() | {"goes on": batches._go_on}),
        str((trainer.run_log.goes_on_after, trainer.run_log.earlier_runs, trainer.broken_off)),
    )


def tried(kind: str, file: str, folder: Path, depth: int) -> Iterator[tuple[tuple[Any, ...], str, str]]:
    """Field, value, and what came of it: refused, harmless, changed, or what went wrong."""
    first = make(kind)
    first.step(*make_batch())
    next(iter(first.dataloader))
    path = save_checkpoint(first, folder / "checkpoint")
    whole = (path / file).read_text()
    trainer = make(kind)
    load_checkpoint(trainer, path)
    intact = told(trainer)
    trainer = make(kind)
    fresh = told(trainer)
    for number, (place, _) in enumerate(fields(json.loads(whole), depth)):
        for name, value in VALUES.items():
            held = json.loads(whole)
            list(fields(held, depth))[number][1](value)
            if (text := json.dumps(held)) == whole.strip():
                continue
            (path / file).write_text(text)
            seal_again(path)
            try:
                load_checkpoint(trainer, path)
            except ValueError as error:
                outcome = "refused" if (now := told(trainer)) == fresh else f"refused after a change: {error}"
            except Exception as error:  # whatever it is, it is the wrong kind
                outcome, now = f"{type(error).__name__}: {error}", told(trainer)
            else:
                outcome = "harmless" if (now := told(trainer)) == intact else "changed"
            yield place, name, outcome
            if now != fresh:
                trainer = make(kind)
    shutil.rmtree(path)


@pytest.mark.parametrize(("kind", "file", "depth"), [("adam", "state.json", 4), ("adam", "rank-0.json", 3)])
def test_a_field_that_is_something_else_is_refused_or_harmless(
    kind: str, file: str, depth: int, tmp_path: Path
) -> None:
    count, wrong = 0, []
    for place, name, outcome in tried(kind, file, tmp_path, depth):
        count += 1
        known = tuple(part for part in place if part != "dict")
        if outcome not in ("refused", "harmless") and not (outcome == "changed" and name in FREE.get(known, ())):
            wrong.append((place, name, outcome))
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:20]}"
    assert count > 100


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for file in (files.STATE, "rank-0.json"):
            outcomes: dict[str, int] = {}
            for place, name, outcome in tried(sys.argv[1] if sys.argv[1:] else "adam", file, Path(folder), 9):
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                if outcome not in ("refused", "harmless"):
                    print(place, name, outcome)
            print(file, outcomes)
