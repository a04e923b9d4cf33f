"""A checkpoint of some ranks goes on with more or fewer: as it would have, within float32, where nothing is sampled.

Run as a script, this file is one of two processes.
"""

from __future__ import annotations

import re
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint, save_in
from ppo_runtime.ranks.world import World
from ppo_runtime.resuming import files
from ppo_runtime.resuming.position import check_world, position, position_here, restore_position, source_of
from ppo_runtime.rollout.data import PromptBatches
from tests.runtime.support import trainers
from tests.runtime.support.processes import run_ranks

EACH = 8
STEPS = 4
HALF = 2


def make_trainer(ranks: int) -> PPOTrainer:
    """One rank of those that share a batch of eight sequences; two batches make an epoch, and a row is left over."""
    rows = [{"input_ids": [5 + row] * (1 + row % 3)} for row in range(2 * EACH + 1)]
    trainer = trainers.make_trainer(
        dataset=rows,
        batch_size=EACH // ranks,
        mini_batch_size=EACH // ranks,
        ppo_epochs=2,
        horizon=50,
        use_score_scaling=True,
        use_score_norm=True,
        learning_rate=1e-3,
        adam_eps=1e-4,
    )
    trainer.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
    return trainer


def go(trainer: PPOTrainer, steps: int) -> list[dict[str, Any]]:
    """Greedy steps on the trainer's own data: the prompts of each, and what is said of all ranks."""
    history: list[dict[str, Any]] = []
    assert trainer.dataloader is not None
    while len(history) < steps:
        for batch in trainer.dataloader:
            queries = [torch.tensor(ids) for ids in batch["input_ids"]]
            responses = trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=False)
            scores = [torch.tensor(float(r.sum() % 7) + len(q)) for q, r in zip(queries, responses, strict=True)]
            stats = trainer.step(queries, responses, scores)
            kept = {name: value for name, value in trainers.untimed(stats).items() if isinstance(value, float)}
            history.append({"prompts": [int(query[0]) for query in queries], "stats": kept})
            if len(history) == steps:
                break
    return history


def outcome(trainer: PPOTrainer, history: list[dict[str, Any]]) -> dict[str, Any]:
    weights = {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}
    return {"history": history, "weights": weights, "state": trainer.state_dict()}


def refused(trainer: PPOTrainer, path: Path) -> list[tuple[str, str]]:
    """What a rank says of a save that the second cannot make, and of a checkpoint with damage to the second's file."""
    rank, said = trainer.world.rank, []
    before = str(trainer.optimizer.state_dict()), trainer.state_dict(), sorted(path.parent.iterdir())
    dist.barrier()  # both have looked

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write, files.write_json = files.write_json, full if rank == 1 else files.write_json
    for attempt in (lambda: save_checkpoint(trainer, path), lambda: load_checkpoint(trainer, path)):
        with pytest.raises((OSError, ValueError)) as caught:
            attempt()
        said.append((type(caught.value).__name__, str(caught.value)))
        files.write_json = write
        if rank == 0:
            own = path / "rank-1.json"
            own.write_bytes(own.read_bytes().replace(b"1", b"2", 1))
        dist.barrier()
    assert (str(trainer.optimizer.state_dict()), trainer.state_dict(), sorted(path.parent.iterdir())) == before
    return said


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    first = make_trainer(2)
    straight = go(first, HALF)
    save_in(folder / "of two", first)
    straight += go(first, STEPS - HALF)
    second = make_trainer(2)
    load_checkpoint(second, folder / "of one")
    went_on = go(second, STEPS - HALF)
    results = {"straight": outcome(first, straight), "of one": outcome(second, went_on)}
    results["refused"] = refused(second, save_checkpoint(second, folder / "alone" / "twice"))
    torch.save(results, folder / f"{second.world.rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process from the beginning, and each way from one number of ranks to the other."""
    folder = tmp_path_factory.mktemp("elastic")
    alone = make_trainer(1)
    history = go(alone, HALF)
    save_checkpoint(alone, folder / "of one")
    history += go(alone, STEPS - HALF)
    ranks = run_ranks(__file__, folder, warnings="default")
    back = make_trainer(1)
    load_checkpoint(back, folder / "of two" / f"checkpoint-{HALF}")
    went_on = go(back, STEPS - HALF)
    return {"alone": outcome(alone, history), "ranks": ranks, "back": outcome(back, went_on)}


def joined(ranks: list[dict[str, Any]], case: str) -> dict[str, Any]:
    """What the ranks did together."""
    histories = zip(*(rank[case]["history"] for rank in ranks), strict=True)
    together = [
        {"prompts": list(chain.from_iterable(part["prompts"] for part in parts)), "stats": parts[0]["stats"]}
        for parts in histories
    ]
    return ranks[0][case] | {"history": together}


@pytest.mark.parametrize("case", ["two from the beginning", "one, then two", "two, then one"])
def test_another_number_of_ranks_does_what_one_does(case: str, runs: dict[str, Any]) -> None:
    """The same prompts in every step, and the same statistics, states and weights within float32."""
    alone = runs["alone"]
    if case == "two, then one":
        found = runs["back"]
    else:
        found = joined(runs["ranks"], "straight" if case == "two from the beginning" else "of one")
    for ours, theirs in zip(reversed(found["history"]), reversed(alone["history"]), strict=False):
        assert sorted(ours["prompts"]) == sorted(theirs["prompts"])
        for name, value in theirs["stats"].items():
            assert ours["stats"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert found["state"]["current_step"] == STEPS
    assert found["state"]["kl_coef"] == pytest.approx(alone["state"]["kl_coef"], rel=1e-6)
    assert found["state"]["scores"] == pytest.approx(alone["state"]["scores"], rel=1e-6)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5, msg=name)


def test_what_one_rank_cannot_write_or_read_all_refuse(runs: dict[str, Any]) -> None:
    """In the same words, and nothing changes on any of them."""
    (kind, write), (other, read) = runs["ranks"][0]["refused"]
    assert runs["ranks"][1]["refused"] == [(kind, write), (other, read)]
    assert kind == "OSError"
    assert re.search("rank 1: .*no checkpoint was made in .*twice: .*No space left on device", write)
    assert other == "ValueError"
    assert re.search(r"rank 1: .*twice cannot be read \(rank-1.json has changed since it was written", read)


# --- the order of the prompts -----------------------------------------------------------------------------------------


def taken(samplers: list[PromptBatches], count: int) -> list[set[int]]:
    """The rows of each step, of all ranks together, from where they stand."""
    found: list[set[int]] = []
    while len(found) < count:
        for batches in zip(*samplers, strict=True):
            found.append(set(chain.from_iterable(batches)))
            if len(found) == count:
                break
    return found


def samplers_of(rows: int, ranks: int, total: int) -> list[PromptBatches]:
    return [
        PromptBatches(rows, total // ranks, drop_last=True, seed=3, world=World(rank=rank, size=ranks))
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("rows", [12, 24, 29, 40])
@pytest.mark.parametrize("then", [1, 2, 3, 4])
@pytest.mark.parametrize("now", [1, 2, 3, 4])
def test_every_step_has_the_rows_that_it_would_have_had(rows: int, then: int, now: int) -> None:
    straight = taken(samplers_of(rows, 1, 12), 7)
    for done in range(1, 6):
        before = samplers_of(rows, then, 12)
        assert taken(before, done) == straight[:done]
        after = samplers_of(rows, now, 12)
        for sampler in after:
            sampler.load_state_dict(before[0].state_dict())
        assert taken(after, 7 - done) == straight[done:]


def test_a_place_of_before_counts_the_batches_of_one_rank() -> None:
    straight = taken(samplers_of(29, 1, 12), 4)
    after = samplers_of(29, 3, 12)
    for sampler in after:
        sampler.load_state_dict({"epoch": 0, "consumed": 1, "rows": 29, "batch_size": 6, "ranks": 2})
    assert taken(after, 3) == straight[1:]


# --- random generators, and what is refused ---------------------------------------------------------------------------


def test_ranks_that_were_there_go_on_and_others_draw_their_own_numbers() -> None:
    trainer = make_trainer(1)
    drawn: dict[Any, tuple[float, ...]] = {}
    states = []
    for _ in range(2):
        torch.rand(3)
        states.append(position(trainer))
    for digest in ("a" * 64, "b" * 64):
        for rank in range(5):
            world = World(rank=rank, size=5)
            there = source_of(world, 2)
            restore_position(trainer, position_here(states[there], world, 2, digest))
            drawn[digest if rank > 1 else "own", rank] = tuple(torch.rand(3).tolist())
    assert len(set(drawn.values())) == 2 + 2 * 3
    for rank, state in enumerate(states):
        restore_position(trainer, state)
        assert tuple(torch.rand(3).tolist()) == drawn["own", rank]


@pytest.mark.parametrize(
    ("ranks", "batch_size", "advice"),
    [
        (2, 4, "8 on 2, 16; set batch_size to 4"),
        (3, 4, "4 on 3, 12; start a number of processes that divides 8"),
        (1, 4, "4 on 1, 4; set batch_size to 8"),
    ],
)
def test_another_number_of_sequences_in_a_step_is_refused(ranks: int, batch_size: int, advice: str) -> None:
    batch_size = 8 if ranks == 2 else batch_size
    trainer: Any = SimpleNamespace(world=World(rank=0, size=ranks), config=SimpleNamespace(batch_size=batch_size))
    with pytest.raises(ValueError, match=rf"made with batch_size 4 on 2 ranks, 8 sequences a step, .* {advice}"):
        check_world(Path("c"), {"batch_size": 4}, 2, trainer)


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
