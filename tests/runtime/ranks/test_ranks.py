"""The trainer on two ranks: what one process makes of the union, and a checkpoint that goes on bit for bit.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.learning import update
from tests.core.close import assert_close
from tests.runtime.support import trainers
from tests.runtime.support.processes import run_ranks
from tests.runtime.training import test_checkpoint

SETTINGS: dict[str, Any] = {"ppo_epochs": 2, "whiten_rewards": True, "use_score_scaling": True, "use_score_norm": True}


def outcome(trainer: PPOTrainer, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics, and weights under names."""
    return {
        "stats": history,
        "weights": {name: x.detach().clone() for name, x in trainer.model.state_dict().items()},
    }


def steps(rows: slice, count: int) -> dict[str, Any]:
    """Two steps on some of six rows, each update on the whole batch."""
    trainer = trainers.make_trainer(batch_size=count, mini_batch_size=count, **SETTINGS)
    batches = [trainers.make_batch(seed=seed) for seed in range(2)]
    return outcome(trainer, [trainers.untimed(trainer.step(*(part[rows] for part in batch))) for batch in batches])


def interrupted(folder: Path) -> dict[str, Any]:
    """One step, a checkpoint, and another step by a trainer made anew."""
    first = test_checkpoint.make_trainer()
    history = test_checkpoint.run(first, 1)
    save_checkpoint(first, folder / "checkpoint")
    second = test_checkpoint.make_trainer()
    load_checkpoint(second, folder / "checkpoint")
    return outcome(second, history + test_checkpoint.run(second, 1))


def sampled() -> list[int]:
    """What a trainer answers to a prompt that every rank has."""
    trainer = trainers.make_trainer()
    return trainer.generate(torch.tensor([5, 6]), max_new_tokens=20, do_sample=True, top_k=0)[0].tolist()


def guarded() -> dict[str, Any]:
    """A loss that is not finite in one minibatch of the second rank alone, then scores that only it cannot take."""
    trainer = trainers.make_trainer(batch_size=3, mini_batch_size=3)
    rank, losses_of, calls = trainer.world.rank, update.losses_of, 0

    def spoiled(now: Any, targets: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        nan = float("nan") if rank == 1 and calls == 2 else 1.0
        return losses_of(now, targets._replace(advantages=targets.advantages * nan), *args)

    update.losses_of = spoiled
    rows = slice(3 * rank, 3 * rank + 3)
    queries, responses, scores = (part[rows] for part in trainers.make_batch())
    stats = trainer.step(queries, responses, scores)
    update.losses_of = losses_of
    said = []
    for bad in (1e20, float("nan")):
        with pytest.raises(ValueError, match="rank 1: ") as caught:
            trainer.step(queries, responses, [bad, *scores[1:]] if rank == 1 else scores)
        said.append(str(caught.value))
    again = trainer.step(queries, responses, scores)
    result = outcome(trainer, [trainers.untimed(stats), trainers.untimed(again)])
    return result | {"skipped": stats["ppo/policy/skipped_updates"], "said": said}


def left_out(rows: slice, count: int) -> list[tuple[float, list[float]]]:
    """Updates left out of three, on some of six rows, by threshold; and the ratios seen here."""
    found = []
    for threshold in (1.013, 1.05):
        trainer = trainers.make_trainer(
            batch_size=count, mini_batch_size=count, drop_last=False, learning_rate=3e-3, ppo_epochs=3
        )
        trainer.config.ratio_threshold = threshold
        seen: list[float] = []

        def objective(*args: Any, seen: list[float] = seen, **settings: Any) -> update.PolicyLoss:
            loss = update.clipped_objective(*args, **settings)
            seen.append(float(loss.ratio.total / loss.ratio.weight))
            return loss

        trainer.policy_objective = objective
        stats = trainer.step(*(part[rows] for part in trainers.make_batch()))
        found.append((stats["ppo/policy/skipped_updates"], seen))
    return found


def gathered() -> dict[str, Any]:
    """A dictionary of statistics over the ranks: token-weighted numbers, ragged distributions, the rest as it is."""
    trainer = trainers.make_trainer()
    rank = trainer.world.rank
    loss, tokens = ((1.0, 3.0), (5.0, 1.0))[rank]
    stats = {"loss": torch.tensor(loss), "minibatch/tokens": torch.tensor(tokens), "dist": torch.arange(2.0 + rank)}
    return trainer.gather_stats(stats | {"text": "x"})


def logged() -> dict[str, Any]:
    """What the first rank logs where it alone has statistics of the scores already, and what a bad reward says."""
    trainer = trainers.make_trainer(batch_size=3, mini_batch_size=3)
    rank, lines = trainer.world.rank, Lines()
    trainer.run_log._trackers = [lines]
    given = {"env/reward_mean": 7.0} if rank == 0 else {}
    trainer.log_stats(given, {}, [[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]][rank])
    with pytest.raises(ValueError, match="rank 1: ") as caught:
        trainer.log_stats({}, {}, [[1.0, 2.0, 3.0], [4.0, float("nan"), 9.0]][rank])
    return {"numbers": lines.latest, "said": str(caught.value)}


class Lines:
    """A tracker that remembers what it was given."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}

    def log(self, step: int, scalars: dict[str, float], texts: Any) -> None:
        """Remember the numbers."""
        self.latest = scalars


def collectives() -> dict[str, int]:
    """How often the ranks meet in a step of two epochs, one update each."""
    trainer = trainers.make_trainer(batch_size=3, mini_batch_size=3, ppo_epochs=2)
    names = [name for name in dir(dist) if name.startswith(("all_", "broadcast", "gather", "scatter", "reduce"))]
    found = {name: getattr(dist, name) for name in [*names, "barrier"] if callable(getattr(dist, name))}
    calls = dict.fromkeys(found, 0)

    def counting(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return found[name](*args, **options)

        return call

    rank = trainer.world.rank
    for name in found:
        setattr(dist, name, counting(name))
    try:
        trainer.step(*(part[3 * rank : 3 * rank + 3] for part in trainers.make_batch()))
    finally:
        for name, function in found.items():
            setattr(dist, name, function)
    return {name: count for name, count in calls.items() if count}


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    straight = test_checkpoint.make_trainer()
    rank = straight.world.rank
    results = {
        "steps": steps(slice(3 * rank, 3 * rank + 3), 3),
        "straight": outcome(straight, test_checkpoint.run(straight, 2)),
        "interrupted": interrupted(folder),
        "sampled": sampled(),
        "guarded": guarded(),
        "collectives": collectives(),
        "left out": left_out(slice(0, 4) if rank == 0 else slice(4, 6), 4),
        "gathered": gathered(),
        "logged": logged(),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks did."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), warnings="default")


@pytest.mark.parametrize("case", ["steps", "straight", "interrupted", "guarded"])
def test_ranks_hold_the_same_weights_and_statistics(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (rank[case] for rank in ranks)
    assert all(torch.equal(x, second["weights"][name]) for name, x in first["weights"].items())
    test_checkpoint.assert_same_history(first["stats"], second["stats"])


def test_two_ranks_do_what_one_does_with_all_rows(ranks: list[dict[str, Any]]) -> None:
    """Weights, and every statistic, after two steps with everything that is normalised over a batch."""
    alone = steps(slice(None), 6)
    for name, x in ranks[0]["steps"]["weights"].items():
        assert_close(x, alone["weights"][name], scale=1e2)
    for ours, theirs in zip(ranks[0]["steps"]["stats"], alone["stats"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_one_rank_cannot_take_all_ranks_leave_out_or_refuse(ranks: list[dict[str, Any]]) -> None:
    """None steps alone and none waits for another: the update is left out on both, and both raise."""
    first, second = (rank["guarded"] for rank in ranks)
    assert first["skipped"] == second["skipped"] == 1
    assert all(x.isfinite().all() for x in first["weights"].values())
    assert first["said"] == second["said"]
    assert [" ".join(said.split()[:5]).rstrip(",") for said in first["said"]] == [
        "rank 1: scores[0] is 1e+20",
        "rank 1: scores[0] is nan",
    ]


def test_the_ratio_that_leaves_an_update_out_is_the_mean_over_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """Of all their tokens, where one rank has four rows and another two; each of them alone would judge otherwise."""
    alone = left_out(slice(None), 6)
    for (skipped, _), (first, ours), (second, theirs) in zip(alone, *(rank["left out"] for rank in ranks), strict=True):
        assert first == second == skipped
        assert ours[-1] > 1.05
        assert theirs[-1] < 1.013 < alone[-1][1][-1] < 1.05
    assert [skipped for skipped, _ in alone] == [1, 0]


def test_ranks_meet_few_times_in_a_step_and_three_times_in_an_update(ranks: list[dict[str, Any]]) -> None:
    """To agree that all may begin, on the advantages' moments, for statistics and distributions, and on the controller.

    A small message goes before statistics and distributions, by which ranks see that they are in one place.
    In an update they agree on its losses, sum the gradients, and agree that all have stepped.
    """
    assert [rank["collectives"] for rank in ranks] == [{"all_gather": 7 + 2 * 2, "all_reduce": 2}] * 2


def test_dictionaries_of_statistics_are_gathered(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["gathered"] for rank in ranks):
        assert found["loss"].item() == 2.0, "(3 * 1 + 1 * 5) / 4, not (1 + 5) / 2"
        assert found["minibatch/tokens"].item() == 4.0
        assert found["dist"].tolist() == [0.0, 1.0, 0.0, 1.0, 2.0]
        assert found["text"] == "x"


def test_rewards_are_logged_over_all_ranks_whatever_one_of_them_has_already(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["logged"]["numbers"] for rank in ranks)
    assert first == {"env/reward_mean": 4.0, "env/reward_std": pytest.approx(8**0.5)}
    assert second == {}, "the first rank writes"


def test_a_reward_that_one_rank_refuses_is_logged_by_none(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["logged"]["said"] for rank in ranks)
    assert first == second
    assert first.startswith("rank 1: rewards[1] is nan")


def test_ranks_answer_one_prompt_each_in_its_own_words(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["sampled"] != ranks[1]["sampled"]


def test_a_checkpoint_of_two_ranks_goes_on_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        test_checkpoint.assert_same_history(rank["interrupted"]["stats"], rank["straight"]["stats"])
        for name, x in rank["straight"]["weights"].items():
            assert torch.equal(x, rank["interrupted"]["weights"][name]), name


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
