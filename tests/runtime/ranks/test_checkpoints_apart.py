"""Checkpoints of a divided model where ranks see different things: disks, copies, rows and moments of their own.

Run as a script, this file is one of two processes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint, save_in
from ppo_runtime.ranks.shards import here
from ppo_runtime.ranks.world import world_from_environment
from ppo_runtime.resuming import files, parts
from tests.runtime.ranks.test_parallel import assert_same_bits
from tests.runtime.ranks.test_sharded_checkpoints import make_trainer, stepped
from tests.runtime.support.divided import need_divided_models
from tests.runtime.support.processes import run_ranks
from tests.runtime.support.trainers import make_trainer as any_trainer
from tests.runtime.training.test_checkpoint_seals import flipped


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


def copies(folder: Path) -> dict[str, list[str]]:
    """What ranks with copies of their own say of each file of parts, where a bit of it is flipped in one of the copies.

    By the way of loading. Some files of each rank: what each looks at for all is not what it reads.
    """
    rank, before = dist.get_rank(), Path.cwd()
    trainer = make_trainer(2)
    stepped(trainer, 0)
    with mock.patch.object(parts, "_LARGEST", 20000):
        save_checkpoint(trainer, folder / "whole")
    own = folder / f"node {rank}"
    shutil.copytree(folder / "whole", own / "checkpoint")
    names = sorted(path.name for path in (own / "checkpoint").glob("shard-*"))
    os.chdir(own)
    found: dict[str, list[str]] = {"names": names}
    for parallelism in ("fsdp2", "ddp"):
        found[parallelism] = []
        loaded = make_trainer(2, parallelism)
        for where in range(2):
            for name in names:
                path = Path("checkpoint", name)
                content = path.read_bytes()
                if rank == where:
                    path.write_bytes(flipped(content, 8 * len(content) - 1))
                found[parallelism].append(said_of(load_checkpoint, loaded, "checkpoint"))
                path.write_bytes(content)
        load_checkpoint(loaded, "checkpoint")
    os.chdir(before)
    return found


class Local(torch.optim.SGD):
    """Keeps a momentum of the rows that a rank holds beside them, as a tensor that is no part of one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            mine = here(parameter.grad)
            momentum = self.state[parameter].setdefault("m", torch.zeros_like(mine))
            here(parameter).sub_(momentum.mul_(0.9).add_(mine), alpha=1e-2)


class Nested(torch.optim.SGD):
    """Keeps the last gradients in a list."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            kept = self.state[parameter].setdefault("kept", [])
            kept.append(parameter.grad.detach().clone())
            del kept[:-2]
            parameter.sub_(sum(kept), alpha=1e-2)


def optimised(kind: Any, parallelism: str = "fsdp2") -> Any:
    return any_trainer(
        batch_size=3,
        mini_batch_size=3,
        ppo_epochs=2,
        parallelism=parallelism,
        optimizer_of=lambda model: kind([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    )


def own_optimisers(folder: Path) -> dict[str, Any]:
    """What becomes of the state of optimisers of a user's own, and of kinds that step on no parts."""
    local = optimised(Local)
    stepped(local, 0)
    found: dict[str, Any] = {"local": said_of(save_checkpoint, local, folder / "local")}
    dist.barrier()
    found["left"] = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    straight = optimised(Nested)
    stepped(straight, 0)
    stepped(straight, 1)
    save_checkpoint(straight, folder / "nested")
    found["straight"] = stepped(straight, 2)
    for name, path in (("nested", "nested"), ("from whole", "whole")):
        if path == "whole":
            replicated = optimised(Nested, "ddp")
            load_checkpoint(replicated, folder / "nested")
            save_checkpoint(replicated, folder / "whole")
        loaded = optimised(Nested)
        load_checkpoint(loaded, folder / path)
        found[name] = stepped(loaded, 2)
    kinds = (torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Rprop)
    found["kinds"] = [said_of(optimised, kind) for kind in kinds]
    return found


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    found: dict[str, Any] = {name: disks(folder, name) for name in ("fsdp2", "ddp")}
    found["frozen"] = frozen(folder / "frozen")
    found["copies"] = copies(folder / "copies")
    found["own"] = own_optimisers(folder / "own")
    torch.save(found, folder / f"{world.rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found."""
    need_divided_models()
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


@pytest.mark.parametrize("parallelism", ["fsdp2", "ddp"])
def test_no_rank_reads_a_damaged_copy_of_its_own(parallelism: str, two: list[dict[str, Any]]) -> None:
    """Of the files that it reads: those of the other rank may be damaged in its copy, where nothing needs them."""
    first, second = (found["copies"] for found in two)
    assert first[parallelism] == second[parallelism]
    assert len(first["names"]) > 4
    cases = [(rank, name) for rank in range(2) for name in first["names"]]
    for (rank, name), said in zip(cases, first[parallelism], strict=True):
        if parallelism == "ddp" or name.startswith(f"shard-0000{rank + 1}-"):
            assert said.startswith(f"rank {rank}: ")
            assert f"{name} has changed since it was written" in said


def test_moments_that_are_no_parts_and_differ_by_rank_are_not_saved(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["own"]["local"].startswith("optimizer.state.0.m is '")
        assert "or parts of one tensor" in found["own"]["local"]
        assert found["own"]["left"] == []


def test_moments_in_a_list_are_those_of_each_rank_again(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert_same_bits(found["own"]["nested"], found["own"]["straight"])
        assert_same_bits(found["own"]["from whole"], found["own"]["straight"])


def test_optimisers_that_step_on_no_parts_are_refused_by_name(two: list[dict[str, Any]]) -> None:
    for said in two[0]["own"]["kinds"]:
        assert "optimizer is of a kind (Adafactor, Adagrad, Rprop) that can't step on parts" in said


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
