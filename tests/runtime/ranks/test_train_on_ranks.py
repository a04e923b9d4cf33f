"""The training loop on two ranks: a signal, a score function, data and a disk that are one rank's alone.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM

from ppo_runtime.loop import train
from ppo_runtime.reporting.jsonl import read_jsonl
from ppo_runtime.resuming import sealing
from tests.runtime.support.divided import DIVIDES_MODELS, divided
from tests.runtime.support.processes import run_ranks
from tests.runtime.support.trainers import make_trainer


def _trainer(home: Path, **more: Any) -> Any:
    rows = Dataset.from_dict({"query": ["q"] * 16, "input_ids": [[5 + row] for row in range(16)]})
    settings = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "horizon": 20}
    return make_trainer(dataset=rows, project_kwargs={"logging_dir": str(home)}, **settings, **more)


def _train(trainer: Any, home: Path, *, score: Any = None, **options: Any) -> Any:
    return train(
        trainer,
        score or (lambda _, texts: [len(set(text)) / 4 for text in texts]),
        steps=4,
        generation_kwargs={"max_new_tokens": 3},
        output_dir=home,
        console=Console(file=io.StringIO()),
        **options,
    )


def signalled(home: Path) -> dict[str, Any]:
    """SIGTERM for the second rank alone, in its second step; then on to the end."""
    trainer = _trainer(home)

    def score(_: list[str], texts: list[str]) -> list[float]:
        if trainer.world.rank == 1 and trainer.current_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return [0.5] * len(texts)

    stopped = _train(trainer, home, score=score)
    finished = _train(_trainer(home), home, resume=True)
    return {"stopped": (stopped.interrupted, stopped.signal, len(stopped.history)), "rest": len(finished.history)}


def broken_off(home: Path) -> dict[str, Any]:
    """Ctrl-C in a score function: of the first rank alone, and of both with a model in parts."""
    found: dict[str, Any] = {}
    cases = {"one": (1, {}), "all": (2, {"parallelism": "fsdp2"})}
    for name, (ranks, settings) in cases.items():
        if settings and not DIVIDES_MODELS:
            continue
        trainer = _trainer(home / name, **settings)

        def score(_: list[str], texts: list[str], trainer: Any = trainer, ranks: int = ranks) -> list[float]:
            if trainer.world.rank < ranks and trainer.current_step == 1:
                raise KeyboardInterrupt
            return [0.5] * len(texts)

        try:
            found[name] = _train(trainer, home / name, score=score).interrupted
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def failing(home: Path) -> str:
    """A score function that fails on the second rank alone."""
    trainer = _trainer(home)

    def score(_: list[str], texts: list[str]) -> list[float]:
        return [1.0 / (trainer.world.rank == 0)] * len(texts)

    with pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
        _train(trainer, home, score=score)
    return str(caught.value)


def unlike(home: Path) -> str:
    """Settings of generation that are not the same."""
    trainer = _trainer(home)
    with pytest.raises(ValueError, match="temperature") as caught:
        train(trainer, lambda _, texts: [0.5] * len(texts), generation_kwargs={"temperature": 1.0 + trainer.world.rank})
    return str(caught.value)


def full(home: Path) -> str:
    """A disk that is full when the first rank saves the model."""
    trainer = _trainer(home)
    save = trainer.save_pretrained

    def fails(directory: Any) -> None:
        save(directory)
        raise OSError(28, "No space left on device")

    trainer.save_pretrained = fails
    with pytest.raises((OSError, RuntimeError)) as caught:
        _train(trainer, home)
    return str(caught.value)


def dropped(home: Path) -> dict[str, Any]:
    """A score that is not finite, of the second rank's first batch; the settings have such batches dropped."""
    trainer = _trainer(home, on_nonfinite="drop")
    calls: list[int] = []

    def score(_: list[str], texts: list[str]) -> list[float]:
        calls.append(1)
        return [float("nan") if trainer.world.rank == 1 and len(calls) == 1 else 0.5] * len(texts)

    result = _train(trainer, home, score=score)
    return {"steps": len(result.history), "calls": len(calls)}


def damaged(home: Path, **settings: Any) -> dict[str, Any]:
    """The newest checkpoint's weights have changed on disk; and then one that the second rank alone cannot read."""
    trainer = _trainer(home, **settings)
    _train(trainer, home, checkpoint_every=1)
    policy = max((home / "checkpoint-4").glob("*.safetensors"))
    if trainer.world.rank == 0:
        content = policy.read_bytes()
        policy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    torch.distributed.barrier()
    rest = len(_train(_trainer(home, **settings), home, resume=True, checkpoint_every=1).history)
    seal = sealing.Seal.of

    def unreadable(path: Path) -> Any:
        if trainer.world.rank == 1 and path == policy:
            raise OSError(5, "Input/output error")
        return seal(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing.Seal, "of", unreadable)
        with pytest.raises(ValueError, match="checkpoint found") as caught:
            _train(_trainer(home, **settings), home, resume=True)
    return {"rest": rest, "said": str(caught.value)}


def damaged_part(home: Path) -> dict[str, Any]:
    """The same of a part of the weights, which one rank alone looks at."""
    return damaged(home, parallelism="fsdp2")


def sharded(home: Path) -> dict[str, Any]:
    """The same with a model of which each rank has a part: two steps, data that end on one rank, and the rest."""
    trainer = _trainer(home, parallelism="fsdp2")

    def score(_: list[str], texts: list[str]) -> list[float]:
        if trainer.world.rank == 1 and trainer.current_step == 2:
            raise LookupError("no score")
        return [0.5] * len(texts)

    with pytest.raises(RuntimeError) as caught:
        _train(trainer, home, score=score, checkpoint_every=1)
    said = [str(caught.value)]
    trainer = _trainer(home, parallelism="fsdp2")
    if trainer.world.rank == 1:
        trainer.dataloader = []
    with pytest.raises(ValueError, match="gave no batch") as ended:
        _train(trainer, home, resume=True)
    again = _trainer(home, parallelism="fsdp2")
    result = _train(again, home, resume=True)
    return {"said": [*said, str(ended.value)], "rest": len(result.history)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(__file__, folder)


def test_a_signal_of_one_rank_stops_all_after_the_same_step(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in ranks[1]:
        assert rank["signalled"] == {"stopped": (True, signal.SIGTERM, 2), "rest": 2}


def test_ctrl_c_in_a_score_function_saves_the_model_on_all_ranks(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ranks
    said = [True, "RuntimeError: rank 0: KeyboardInterrupt"]
    assert [rank["broken_off"]["one"] for rank in found] == said, "the other rank is not lost"
    for name in found[0]["broken_off"]:
        AutoModelForCausalLM.from_pretrained(folder / "broken_off" / name / "model")
    assert [rank["broken_off"].get("all", True) for rank in found] == [True, True]


def test_what_fails_on_one_rank_ends_all_of_them(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ranks
    assert "division by zero" in found[1]["failing"]
    assert not (folder / "failing" / "model").exists()
    assert "No space left on device" in found[0]["full"]
    assert not (folder / "full" / "model").exists()
    assert all("rank 1: ZeroDivisionError: float division by zero" in rank["failing"] for rank in found)
    assert all("rank 0: " in rank["full"] and "No space left on device" in rank["full"] for rank in found)


def test_settings_of_generation_that_differ_are_refused(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in ranks[1]:
        assert rank["unlike"].startswith(
            "temperature of generation_kwargs is 1.0 on rank 0 and 2.0 on rank 1; expected"
        )


def test_a_batch_of_one_rank_is_dropped_by_all(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = ranks
    assert [rank["dropped"] for rank in found] == [{"steps": 4, "calls": 5}] * 2
    assert [path.name for path in sorted(folder.glob("dropped/not-finite/*"))] == [
        "step-1-rank-1.json",
        "step-1-rank-1.safetensors",
    ]


def test_a_damaged_checkpoint_is_left_by_all_ranks_for_the_same_one(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in ranks[1]:
        for found in (rank["damaged"], rank.get("damaged_part", rank["damaged"])):
            assert found["rest"] == 1
            assert "the step of the checkpoint found is 4 on rank 0 and 3 on rank 1" in found["said"]


@divided
def test_a_model_in_parts_is_trained_and_saved_and_its_ranks_fail_together(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, found = ranks
    for rank in found:
        assert "rank 1: " in rank["sharded"]["said"][0]
        assert "no score" in rank["sharded"]["said"][0]
        assert "rank 1: the dataloader gave no batch" in rank["sharded"]["said"][1]
        assert rank["sharded"]["rest"] == 2
    AutoModelForCausalLM.from_pretrained(folder / "sharded" / "model")
    assert [line["step"] for line in read_jsonl(folder / "sharded" / "metrics.jsonl")] == [1, 2, 3, 4]


PARTED = (sharded, damaged_part) * DIVIDES_MODELS
RUNS = (signalled, broken_off, failing, unlike, full, dropped, damaged, *PARTED)


def main(folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    found = {run.__name__: run(folder / run.__name__) for run in RUNS}
    rank = torch.distributed.get_rank()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
