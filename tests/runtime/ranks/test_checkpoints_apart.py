"""Checkpoints of a divided model where ranks see different things: disks, copies, rows and moments of their own.

Run as a script, this file is one of two processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

from ppo_runtime.checkpoint import save_checkpoint, save_in
from ppo_runtime.ranks.shards import here
from ppo_runtime.ranks.world import world_from_environment
from ppo_runtime.resuming import files
from tests.runtime.ranks.test_sharded_checkpoints import make_trainer, stepped
from tests.runtime.support.processes import run_ranks


def said_of(call: Any, *given: Any, **named: Any) -> str:
    """What a refusal says; nothing where there is none."""
    try:
        call(*given, **named)
    except (OSError, TypeError, ValueError) as error:
        return str(error)
    return ""


# --- what the ranks do ------------------------------------------------------------------------------------------------


def disks(folder: Path, parallelism: str) -> dict[str, Any]:
    """Saves into a directory that each rank has for itself, after one that both have had."""
    rank = dist.get_rank()
    trainer = make_trainer(2, parallelism)
    own = folder / parallelism / f"node {rank}"
    own.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(own)
    try:
        (own / "run" / ".checkpoint-2.draft").mkdir(parents=True)  # as a killed one leaves it
        found = []
        for step in range(2):
            stepped(trainer, step)
            found.append(said_of(save_in, "run", trainer, keep_last=1))
        return {"said": found, "left": sorted(path.name for path in own.rglob("checkpoint-*"))}
    finally:
        os.chdir(before)


def frozen(path: Path) -> list[bool]:
    """Whether a checkpoint knows that a row of the reference has changed, also of one rank alone."""
    trainer = make_trainer(2)
    weight = next(p for name, p in trainer.ref_model.named_parameters() if "embed" in name)
    known, digests = [], set()
    for row in (None, 1, len(weight) - 2, 3):
        if row is not None:
            factor = torch.ones(weight.shape)
            factor[row] = 2
            with torch.no_grad():
                weight.mul_(distribute_tensor(factor, weight.device_mesh, weight.placements))
        stepped(trainer, 1)
        save_checkpoint(trainer, path)
        digest = json.loads((path / files.STATE).read_text())["frozen"]
        known.append(digest not in digests)
        digests.add(digest)
    # What nothing counts, in an entry that one rank looks at.
    if dist.get_rank() == 0:
        here(weight)[0] += 1
    save_checkpoint(trainer, path)
    return [*known, json.loads((path / files.STATE).read_text())["frozen"] not in digests]


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    found: dict[str, Any] = {name: disks(folder, name) for name in ("fsdp2", "ddp")}
    found["frozen"] = frozen(folder / "frozen")
    torch.save(found, folder / f"{world.rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        pytest.skip("this torch is refused")
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("parallelism", ["fsdp2", "ddp"])
def test_no_checkpoint_is_made_on_disks_that_are_not_shared(parallelism: str, two: list[dict[str, Any]]) -> None:
    """Neither where a directory is missing, nor where one is there that a killed save has left."""
    first, second = (found[parallelism] for found in two)
    assert first["said"] == second["said"]
    assert first["left"] == second["left"] == []
    assert first["said"][0].startswith("rank 1: [Errno 2] no checkpoint was made")
    assert first["said"][1].startswith("rank 0: [Errno 2] no checkpoint was made")


def test_a_change_of_a_row_that_one_rank_holds_is_known_to_all(two: list[dict[str, Any]]) -> None:
    assert [found["frozen"] for found in two] == [[True] * 5] * 2


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
