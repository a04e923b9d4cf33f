"""A run's files are the run's: ended, broken off, resumed, or begun where another one was."""

import errno
import io
import json
import logging
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from ppo_runtime import loop, results
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint, steps_done
from ppo_runtime.loop import train
from ppo_runtime.reporting.jsonl import JsonlTracker, read_jsonl
from ppo_runtime.reporting.run_log import RunLog
from ppo_runtime.reporting.tracking import make_trackers
from ppo_runtime.resuming import sealing
from ppo_runtime.rollout.digest import prompt_digest
from tests.runtime.support.trainers import make_batch, make_trainer

EARLIER, FILE = "metrics-1.jsonl", "metrics.jsonl"


def _rows(count: int = 8, *, first: int = 5) -> Dataset:
    return Dataset.from_dict({"query": ["q"] * count, "input_ids": [[first + row] for row in range(count)]})


def _trainer(home: Path, dataset: Any = None, **settings: Any) -> Any:
    options: dict[str, Any] = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "horizon": 20}
    return make_trainer(dataset=dataset or _rows(), project_kwargs={"logging_dir": str(home)}, **(options | settings))


def _train(trainer: Any, home: Path | None, *, steps: int | None = 2, score: Any = None, **options: Any) -> Any:
    return train(
        trainer,
        score or (lambda _, texts: [len(set(text)) / 4 for text in texts]),
        steps=steps,
        generation_kwargs={"max_new_tokens": 3},
        output_dir=home,
        console=Console(file=io.StringIO()),
        **options,
    )


def _steps(path: Path) -> list[int]:
    return [line["step"] for line in read_jsonl(path)]


def _weights(trainer: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- metrics -----------------------------------------------------------------------------------------------------


def test_a_second_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    for run, steps in enumerate((1, 2, 3), start=1):
        _train(_trainer(tmp_path), None, steps=steps)
        assert _steps(tmp_path / FILE) == [*range(1, steps + 1)]
        assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == sorted(
            [FILE, *(f"metrics-{number}.jsonl" for number in range(1, run))]
        )
    assert _steps(tmp_path / EARLIER) == [1]


def test_a_loop_of_ones_own_begins_a_file_as_well(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = _trainer(tmp_path)
        queries, responses, scores = make_batch(4)
        trainer.log_stats(trainer.step(queries, responses, scores), {}, scores)
        trainer.close()
        trainer.log_stats(trainer.step(queries, responses, scores), {}, scores)
        trainer.close()
        assert _steps(tmp_path / FILE) == [1, 2], "a trainer that was closed goes on with its file"
    assert _steps(tmp_path / EARLIER) == [1, 2]


def test_a_step_that_was_refused_makes_no_resumed_run_of_a_fresh_one(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), None, steps=2)
    trainer = _trainer(tmp_path)
    queries, responses, scores = make_batch(4)
    with pytest.raises(ValueError, match="scores"):
        trainer.step(queries, responses, scores[1:])
    trainer.log_stats(trainer.step(queries, responses, scores), {}, scores)
    trainer.close()
    assert _steps(tmp_path / EARLIER) == [1, 2]


@pytest.mark.parametrize("own_loop", [True, False])
def test_steps_beyond_the_checkpoint_are_not_doubled(tmp_path: Path, own_loop: bool) -> None:
    """Killed after step 3 with a checkpoint of step 2, while an earlier run's file lies beside it."""
    (tmp_path / EARLIER).write_text('{"step": 1}\n')

    def die(_: list[str], texts: list[str]) -> list[float]:
        if trainer.current_step == 3:
            raise RuntimeError("killed")
        return [0.5] * len(texts)

    trainer = _trainer(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        _train(trainer, tmp_path, steps=6, score=die, checkpoint_every=2)
    assert _steps(tmp_path / FILE) == [1, 2, 3]
    again = _trainer(tmp_path)
    if own_loop:
        load_checkpoint(again, tmp_path / "checkpoint-2")
        queries, responses, scores = make_batch(4)
        again.log_stats(again.step(queries, responses, scores), {}, scores)
        again.close()
        assert _steps(tmp_path / FILE) == [1, 2, 3]
    else:
        _train(again, tmp_path, steps=4, resume=True)
        assert _steps(tmp_path / FILE) == [1, 2, 3, 4]
    assert _steps(tmp_path / EARLIER) == [1]


@pytest.mark.parametrize("goes_on_after", [None, 1])
def test_metrics_that_are_a_link_stay_one(tmp_path: Path, goes_on_after: int | None) -> None:
    (tmp_path / "far").mkdir()
    lines = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "far" / "file").write_text(lines)
    (tmp_path / FILE).symlink_to("far/file")
    for tracker in make_trackers(None, tmp_path, {}, "p", {}, goes_on_after=goes_on_after):
        tracker.log(2, {"a": 1.0}, {})
        tracker.close()
    assert (tmp_path / FILE).is_symlink()
    before, aside = ("", lines) if goes_on_after is None else ('{"step": 1}\n', '{"step": 2}\n')
    assert (tmp_path / "far" / "file").read_text() == before + '{"step": 2, "a": 1.0}\n'
    assert (tmp_path / EARLIER).read_text() == aside
    assert not (tmp_path / EARLIER).is_symlink()


def test_what_is_taken_out_is_only_what_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text('{"step": 1}\nno json\n{"step": 3}\n{"step": 2}\n[4]\n{"st')
    for tracker in make_trackers(None, tmp_path, {}, "p", {}, goes_on_after=2):
        tracker.log(3, {}, {})
        tracker.close()
    assert path.read_text() == '{"step": 1}\nno json\n{"step": 2}\n[4]\n{"step": 3}\n'


@pytest.mark.parametrize("left", ["", '{"st'])
def test_a_file_without_a_line_is_nobodys_run(tmp_path: Path, left: str) -> None:
    (tmp_path / FILE).write_text(left)
    make_trackers(None, tmp_path, {}, "p", {})[0].close()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_bare_tracker_goes_on_as_before(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = JsonlTracker(tmp_path / FILE)
        tracker.log(step, {}, {})
        tracker.close()
    assert _steps(tmp_path / FILE) == [1, 2]


def test_tensorboard_forgets_the_steps_that_are_made_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for goes_on_after, steps, value in ((None, (1, 2, 3), 0.0), (1, (2, 3), 1.0)):
        # Event files are read in the order of their names, which begin with the second they were made in.
        made = {"filename_suffix": f".{goes_on_after}"}
        for tracker in make_trackers("tensorboard", tmp_path, made, "p", {}, goes_on_after=goes_on_after):
            for step in steps:
                tracker.log(step, {"a": value}, {})
            tracker.close()
    first, second = sorted(tmp_path.glob("events.*"), key=lambda path: path.suffix == ".1")
    second.rename(tmp_path / first.name.replace("events.out.tfevents.", "events.out.tfevents.9"))
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("a")] == [(1, 0.0), (2, 1.0), (3, 1.0)]


def test_a_resumed_run_takes_no_line_of_another_one(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path / "one", steps=1)
    _train(_trainer(tmp_path), tmp_path / "two", steps=4)
    other = (tmp_path / FILE).read_bytes()
    _train(_trainer(tmp_path), tmp_path / "one", steps=2, resume=True)
    assert other in [path.read_bytes() for path in tmp_path.glob("metrics-*.jsonl")]
    assert _steps(tmp_path / FILE) == [2]


@pytest.mark.parametrize("kind", ["straight on", "resumed"])
def test_branches_of_one_run_lose_no_line(tmp_path: Path, kind: str) -> None:
    """A copied checkpoint goes on while the run that it was copied from has gone on as well; then that one again."""
    branches = [tmp_path / "one", tmp_path / "two"]
    if kind == "resumed":
        _train(_trainer(tmp_path), branches[0], steps=1)
    trainer = _trainer(tmp_path)
    _train(trainer, branches[0], steps=2, resume=kind == "resumed")
    shutil.copytree(branches[0], branches[1])
    _train(trainer, branches[0], steps=4)
    made = [line for line in (tmp_path / FILE).read_text().splitlines() if json.loads(line)["step"] > 2]
    _train(_trainer(tmp_path), branches[1], steps=5, resume=True)
    assert _steps(tmp_path / FILE) == [1, 2, 3, 4, 5]
    other = (tmp_path / FILE).read_bytes()
    files = [path.read_text().splitlines() for path in tmp_path.glob("metrics-*.jsonl")]
    assert made in files, "the first branch's steps"
    _train(_trainer(tmp_path), branches[0], steps=5, resume=True)
    assert other in [path.read_bytes() for path in tmp_path.glob("metrics-*.jsonl")], "the second branch's, whole"
    assert _steps(tmp_path / FILE) == [5]


@pytest.mark.parametrize("order", ["log first", "checkpoint first", "without a log"])
def test_a_loop_of_ones_own_goes_on_with_its_file(tmp_path: Path, order: str) -> None:
    """Whatever it does first after a step, and in three sittings."""
    for sitting in range(3):
        trainer = _trainer(tmp_path)
        if sitting:
            load_checkpoint(trainer, tmp_path / "checkpoint")
        queries, responses, scores = make_batch(4)
        if order == "without a log" and sitting == 1:
            save_checkpoint(trainer, tmp_path / "checkpoint")
            continue
        stats = trainer.step(queries, responses, scores)
        if order == "checkpoint first":
            save_checkpoint(trainer, tmp_path / "checkpoint")
        trainer.log_stats(stats, {}, scores)
        trainer.close()
        if order != "checkpoint first":
            save_checkpoint(trainer, tmp_path / "checkpoint")
    assert _steps(tmp_path / FILE) == ([1, 2] if order == "without a log" else [1, 2, 3])
    assert [path.name for path in tmp_path.glob("metrics*")] == [FILE]


def test_a_lone_surrogate_is_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / FILE)
    tracker.log(1, {}, {"t": [{"text": "\ud800"}]})
    tracker.close()
    assert _steps(tmp_path / FILE) == [1]


def test_settings_of_another_tracker_are_left_to_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    for tracker in make_trackers("tensorboard", tmp_path, {"wandb": {"entity": "us"}}, "p", {}):
        tracker.close()


# --- the end of a run --------------------------------------------------------------------------------------------


def test_every_run_ends_with_a_checkpoint_from_which_it_goes_on(tmp_path: Path) -> None:
    straight = _trainer(tmp_path / "straight")
    _train(straight, tmp_path / "straight", steps=4)
    _train(_trainer(tmp_path / "cut"), tmp_path / "cut", steps=2)
    assert steps_done(tmp_path / "cut" / "checkpoint-2") == 2
    longer = _trainer(tmp_path / "cut")
    _train(longer, tmp_path / "cut", steps=4, resume=True)
    assert _same(_weights(straight), _weights(longer))
    assert _steps(tmp_path / "cut" / FILE) == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_finished_run_is_not_run_again(tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    _train(_trainer(tmp_path), tmp_path, steps=2)
    lines = (tmp_path / FILE).read_bytes()
    trainer = _trainer(tmp_path)
    trainer.generate = None  # it would not be able to
    assert _train(trainer, tmp_path, steps=steps, resume=True).history == []
    assert f"nothing is left to train after step 2, since steps is {steps}; ask for more steps" in caplog.text
    assert (tmp_path / FILE).read_bytes() == lines
    assert steps_done(tmp_path / "checkpoint-2") == 2


def test_steps_that_nobody_has_set_are_told_by_their_setting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Eight sequences in steps of four."""
    _train(_trainer(tmp_path), tmp_path, steps=2)
    trainer = _trainer(tmp_path)
    trainer.config.steps = 8
    assert _train(trainer, tmp_path, steps=None, resume=True).history == []
    assert (
        "nothing is left to train after step 2, since total_ppo_epochs is 2, which config.steps and batch_size make; "
        "pass train more steps"
    ) in caplog.text


def test_training_that_is_asked_for_again_goes_on_with_the_next_prompts(tmp_path: Path) -> None:
    """In the middle of an epoch, as a run that resumes does."""
    straight = _trainer(tmp_path / "straight")
    _train(straight, tmp_path / "straight", steps=5)
    parted = _trainer(tmp_path / "parted")
    for steps in (1, 2, 5):
        _train(parted, tmp_path / "parted", steps=steps)
    assert _same(_weights(straight), _weights(parted))
    assert _steps(tmp_path / "parted" / FILE) == [1, 2, 3, 4, 5]


def test_resuming_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(_train(_trainer(tmp_path), tmp_path, steps=1, resume=True).history) == 1
    assert "there is no checkpoint to resume: the run starts from the beginning" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight = _trainer(tmp_path / "straight")
    _train(straight, tmp_path / "straight", steps=4)
    home = tmp_path / "run"
    _train(_trainer(home), home, steps=4, checkpoint_every=1)
    assert sorted(path.name for path in home.glob("checkpoint*")) == ["checkpoint-3", "checkpoint-4"]
    policy = home / "checkpoint-4" / "policy.safetensors"
    content = policy.read_bytes()
    policy.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    again = _trainer(home)
    _train(again, home, steps=4, resume=True)
    assert "checkpoint-4 cannot be read (policy.safetensors" in caplog.text
    assert _same(_weights(straight), _weights(again))
    assert _steps(home / FILE) == [1, 2, 3, 4]
    assert _steps(home / EARLIER) == [4], "what was made from the lost weights is kept beside"
    assert steps_done(home / "checkpoint-4") == 4


def test_what_is_resumed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a large model take minutes to look at."""
    _train(_trainer(tmp_path), tmp_path, checkpoint_every=1)
    read: list[Path] = []
    seal = sealing.Seal.of
    monkeypatch.setattr(sealing.Seal, "of", lambda path: read.append(path) or seal(path))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_in", lambda *_, **__: None)
        _train(_trainer(tmp_path), tmp_path, steps=3, resume=True)
    tensors = [str(path.relative_to(tmp_path)) for path in read if path.suffix == ".safetensors"]
    assert sorted(tensors) == [f"checkpoint-2/{name}.safetensors" for name in ("optimizer", "policy")]


def test_a_place_that_only_the_earlier_checkpoints_run_writes_is_looked_at(tmp_path: Path) -> None:
    """The newest one is damaged, and holds what no save replaces: that is said before a step is made."""
    _train(_trainer(tmp_path), tmp_path, checkpoint_every=1)
    policy = tmp_path / "checkpoint-2" / "policy.safetensors"
    content = policy.read_bytes()
    policy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("precious")
    trainer = _trainer(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-2 holds notes\.txt"):
        _train(trainer, tmp_path, steps=3, resume=True)
    assert trainer.current_step == 0


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path, steps=1)
    (tmp_path / "checkpoint-1" / "policy.safetensors").write_bytes(b"")
    before = _files(tmp_path)
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
            _train(_trainer(tmp_path), tmp_path, steps=1, resume=resume)
    assert _files(tmp_path) == before


@pytest.mark.parametrize("best", [1, 2])
def test_how_many_checkpoints_are_kept_is_asked_for(tmp_path: Path, best: int) -> None:
    trainer = _trainer(tmp_path)
    score = lambda _, texts: [float(trainer.current_step + 1 == best)] * len(texts)  # noqa: E731  of one line
    _train(trainer, tmp_path, steps=5, score=score, checkpoint_every=1, keep_last=1, keep_best=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == [f"checkpoint-{best}", "checkpoint-5"]


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path, steps=2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint")
    assert len(_train(_trainer(tmp_path), tmp_path, steps=3, resume=True).history) == 1
    assert steps_done(tmp_path / "checkpoint-3") == 3


def test_a_checkpoint_that_was_being_replaced_is_resumed(tmp_path: Path) -> None:
    """A crash between the two renames leaves the old checkpoint under its waiting name."""
    _train(_trainer(tmp_path), tmp_path, steps=2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.previous")
    assert steps_done(tmp_path / "checkpoint-2") == 2
    assert len(_train(_trainer(tmp_path), tmp_path, steps=3, resume=True).history) == 1


@pytest.mark.parametrize("fails", ["close", "both"])
def test_a_tracker_that_cannot_close_costs_no_model(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, *_: Any) -> None: ...

        def close(self, **_: Any) -> None:
            closed.append(self)
            raise RuntimeError("no network")

    closed: list[Any] = []
    trainer = _trainer(tmp_path)
    trainer.run_log._trackers = [Broken(), Broken()] if fails == "both" else [Broken(), JsonlTracker(tmp_path / FILE)]
    assert len(_train(trainer, tmp_path, steps=1).history) == 1
    assert "Broken could not be closed, and may lack the last steps: RuntimeError: no network" in caplog.text
    assert (tmp_path / "model" / "config.json").exists()
    assert len(closed) == (2 if fails == "both" else 1)
    assert fails == "both" or _steps(tmp_path / FILE) == [1]


def test_the_error_that_ends_a_run_is_raised_although_a_tracker_cannot_close(tmp_path: Path) -> None:
    class Broken:
        def log(self, *_: Any) -> None: ...

        def close(self, **_: Any) -> None:
            raise OSError("no network")

    def score(*_: Any) -> list[float]:
        raise KeyError("a mistake of the user's")

    trainer = _trainer(tmp_path)
    trainer.run_log._trackers = [Broken()]
    with pytest.raises(KeyError, match="a mistake of the user's"):
        _train(trainer, None, score=score)


def test_a_line_that_could_not_be_written_comes_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A disk with room for a few bytes more."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self.file.write(content[: self.room])
            self.room = 0
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    trainer, seen = _trainer(tmp_path), []

    def score(_: Any, texts: list[str]) -> list[float]:
        seen.append(len(seen))
        if len(seen) == 2:
            (tracker,) = trainer.trackers
            monkeypatch.setattr(tracker, "_file", Full(tracker._file))
        return [float(len(text)) for text in texts]

    with pytest.raises(OSError, match=rf"{FILE} has no line of step 2: .*No space left.*; make room") as failed:
        _train(trainer, None, steps=4, score=score)
    assert failed.value.errno == errno.ENOSPC
    assert trainer.current_step == 2
    assert (tmp_path / FILE).read_bytes().endswith(b"}\n"), "half a line is left"
    assert _steps(tmp_path / FILE) == [1]
    _train(trainer, None, steps=4, score=score)
    assert _steps(tmp_path / FILE) == [1, 2, 3, 4]


def test_a_score_function_may_go_to_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was named beside the first stays where it was."""
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    monkeypatch.chdir(home)
    trainer = _trainer(Path("logs"), on_nonfinite="drop")
    calls = 0

    def score(_: Any, texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        monkeypatch.chdir(other)
        return [float("nan") if calls == 2 else float(len(text)) for text in texts]

    _train(trainer, Path("run"), steps=3, score=score, checkpoint_every=1)
    trainer.log_stats({}, {}, [torch.tensor(1.0)] * 4)
    trainer.close()
    assert not list(other.iterdir())
    assert sorted(path.name for path in (home / "run").iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
        "model",
        "run.json",
    ]
    assert (home / "logs" / "not-finite").is_dir()


# --- another run's checkpoint ------------------------------------------------------------------------------------


def test_data_of_another_length_are_refused_before_anything_changes(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path)
    trainer = _trainer(tmp_path, _rows(9))
    before = _weights(trainer)
    with pytest.raises(ValueError, match="was made with a dataset of 8 rows, and this one has 9; pass the dataset of"):
        _train(trainer, tmp_path, steps=4, resume=True)
    assert _same(before, _weights(trainer))
    assert trainer.current_step == 0
    assert not trainer.optimizer.state
    assert _steps(tmp_path / FILE) == [1, 2]


@pytest.mark.parametrize("kind", ["other prompts", "a list", "the same"])
def test_other_prompts_are_refused(tmp_path: Path, kind: str) -> None:
    _train(_trainer(tmp_path), tmp_path)
    rows = _rows(first=6) if kind == "other prompts" else _rows().to_list() if kind == "a list" else _rows()
    trainer = _trainer(tmp_path, rows)
    refused = pytest.raises(ValueError, match="was made with a dataset of other prompts; pass the dataset of then")
    with refused if kind == "other prompts" else nullcontext():
        _train(trainer, tmp_path, steps=3, resume=True)
    assert trainer.current_step == (0 if kind == "other prompts" else 3)


def test_data_without_a_place_begin_again_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _train(_trainer(tmp_path, _rows().to_iterable_dataset()), tmp_path)
    _train(_trainer(tmp_path, _rows().to_iterable_dataset()), tmp_path, steps=3, resume=True)
    assert "the data begins again" in caplog.text


def test_looking_at_prompts_draws_nothing() -> None:
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            raise AssertionError

    assert prompt_digest(Rows()) is None
    assert prompt_digest(_rows()) == prompt_digest(_rows().to_list()) != prompt_digest(_rows(first=6))
    assert prompt_digest(_rows().with_format("torch")) == prompt_digest(_rows())


def test_another_batch_size_is_refused(tmp_path: Path) -> None:
    _train(_trainer(tmp_path, _rows(12), batch_size=2, horizon=50), tmp_path, steps=3)
    wider = _trainer(tmp_path, _rows(12), batch_size=4)
    with pytest.raises(
        ValueError, match=r"batch_size 2 on 1 ranks, 2 sequences a step, .* 4 on 1, 4; set batch_size to 2"
    ):
        _train(wider, tmp_path, steps=4, resume=True)
    assert wider.current_step == 0


@pytest.mark.parametrize("kind", ["tuples", "lists", "tensors", "arrays"])
def test_a_checkpoint_is_made_whatever_the_rows_are(tmp_path: Path, kind: str) -> None:
    ids = torch.tensor([5, 6])
    row: Any = {"tuples": (ids, ids), "lists": [5, 6], "tensors": ids, "arrays": ids.numpy()}[kind]
    assert (prompt_digest([row] * 8) is None) == (kind == "tuples")
    save_checkpoint(_trainer(tmp_path, [row] * 8), tmp_path / "checkpoint")
    assert steps_done(tmp_path / "checkpoint") == 0


def test_a_digest_runs_no_transform() -> None:
    def fail(_: Any) -> Any:
        raise AssertionError

    assert prompt_digest(_rows().with_transform(fail)) is None


# --- a run that lies there ---------------------------------------------------------------------------------------


def _files(home: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "asked",
    [{"temperature": -1}, {"top_kk": 3}, {"num_return_sequences": 2}, {"pad_token_id": -1}, {"length_sampler": 3}],
    ids=lambda asked: next(iter(asked)),
)
def test_a_start_that_is_refused_touches_no_earlier_run(tmp_path: Path, asked: dict[str, Any], resume: bool) -> None:
    _train(_trainer(tmp_path), tmp_path)
    before = _files(tmp_path)
    trainer = _trainer(tmp_path)
    trainer.current_step = 0 if resume else 1
    with pytest.raises((ValueError, TypeError), match=next(iter(asked))):
        train(trainer, lambda _, texts: [0.5], steps=4, generation_kwargs=asked, output_dir=tmp_path, resume=resume)
    assert _files(tmp_path) == before


def test_a_start_that_fails_before_its_first_step_saves_nothing(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path)
    (tmp_path / "checkpoint-2").rename(tmp_path / "kept")
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"steps": 9}))  # a run that was broken off
    before = _files(tmp_path / "model") | {tmp_path / "run.json": (tmp_path / "run.json").read_bytes()}
    with pytest.raises(ZeroDivisionError):
        _train(_trainer(tmp_path), tmp_path, score=lambda *_: 1 / 0, resume=True)
    assert before.items() <= _files(tmp_path).items()


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    before = _files(tmp_path)
    with pytest.raises(ValueError, match="holds the results of a finished run and no checkpoint"):
        _train(_trainer(tmp_path), tmp_path, resume=True)
    assert _files(tmp_path) == before


def test_files_of_the_users_in_old_checkpoints_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def score(_: Any, texts: Any) -> list[float]:
        if (tmp_path / "checkpoint-1").is_dir():
            (tmp_path / "checkpoint-1" / "eval.json").write_text("precious")
        return [0.5] * len(texts)

    _train(_trainer(tmp_path), tmp_path, steps=5, checkpoint_every=1, score=score)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    assert (tmp_path / "checkpoint-1" / "eval.json").read_text() == "precious"
    assert caplog.text.count("holds eval.json, which is not its own: it is kept") == 1


@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_is_no_directory_of_a_run(tmp_path: Path, resume: bool) -> None:
    """As other libraries would have it: a run in it would never find the steps that it has made."""
    _train(_trainer(tmp_path / "logs"), tmp_path / "run")
    there = tmp_path / "run" / "checkpoint-2"
    held = sorted(there.iterdir())
    with pytest.raises(
        ValueError, match=r"run/checkpoint-2', which is a checkpoint itself.*pass '[^']*/run' and resume"
    ):
        _train(_trainer(tmp_path / "logs"), there, steps=4, resume=resume)
    assert sorted(there.iterdir()) == held


def test_the_advice_for_a_checkpoint_of_another_name_names_no_run(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "logs")
    save_checkpoint(trainer, tmp_path / "mine")
    with pytest.raises(ValueError, match="a checkpoint itself, expected the directory of a run; load it by load_check"):
        _train(trainer, tmp_path / "mine")


def test_rows_that_were_changed_before_a_run_are_those_of_its_checkpoints(tmp_path: Path) -> None:
    """Also of one that makes none itself, and where the trainer has made one of the rows before."""
    rows = list(_rows())
    trainer = _trainer(tmp_path / "logs", rows)
    save_checkpoint(trainer, tmp_path / "before")
    rows[:] = list(_rows(first=30))
    _train(trainer, None, steps=1)
    load_checkpoint(_trainer(tmp_path / "other logs", rows), save_checkpoint(trainer, tmp_path / "after"))
    with pytest.raises(ValueError, match="a dataset of other prompts"):
        load_checkpoint(trainer, tmp_path / "before")


def test_a_fresh_run_replaces_no_checkpoint_unasked(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path)
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=r"holds the checkpoint of a run after step 2.*resume=True.*another output"):
        _train(_trainer(tmp_path), tmp_path, steps=3)
    assert _files(tmp_path) == before


def test_checkpoints_that_no_save_replaces_stop_no_resume(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path)
    notes = tmp_path / "checkpoint-2" / "notes.txt"
    notes.write_text("precious")
    _train(_trainer(tmp_path), tmp_path, steps=3, resume=True)
    assert notes.read_text() == "precious"


def test_a_damaged_checkpoint_is_replaced_by_the_resumed_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _train(_trainer(tmp_path), tmp_path, checkpoint_every=1)
    for name in ("state.json", "manifest.json"):
        (tmp_path / "checkpoint-2" / name).unlink()
    _train(_trainer(tmp_path), tmp_path, checkpoint_every=1, resume=True)
    assert steps_done(tmp_path / "checkpoint-2") == 2
    assert "checkpoint-2 cannot be read (state.json is missing)" in caplog.text
    assert "earlier version" not in caplog.text


def test_steps_of_its_own_let_a_trainer_into_its_own_run_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    _train(_trainer(home), home)
    before = _files(home)
    other = _trainer(tmp_path / "logs")
    other.step(*make_batch(4))
    with pytest.raises(ValueError, match=r"holds the checkpoint of another run after step 2, expected none or one of"):
        _train(other, home, steps=3)
    assert _files(home) == before
    own = _trainer(home)
    load_checkpoint(own, home / "checkpoint-2")
    _train(own, home, steps=3)
    _train(own, home, steps=4)
    assert steps_done(home / "checkpoint-4") == 4


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("left", ["all but checkpoints", "a record of before names", "a model alone"])
def test_steps_of_its_own_let_a_trainer_replace_no_other_runs_model(tmp_path: Path, left: str, resume: bool) -> None:
    _train(_trainer(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    if left == "a record of before names":
        record = json.loads((tmp_path / "run.json").read_text())
        del record["runs"]
        (tmp_path / "run.json").write_text(json.dumps(record))
    elif left == "a model alone":
        (tmp_path / "run.json").unlink()
    before = _files(tmp_path)
    other = _trainer(tmp_path / "logs")
    other.step(*make_batch(4))
    said = r"'model', expected none or that of the run .* made 1 steps of"
    if resume:
        said = "holds a model in 'model' and neither" if left == "a model alone" else "the results of a finished run"
    with pytest.raises(ValueError, match=said):
        _train(other, tmp_path, steps=3, resume=resume)
    assert _files(tmp_path) == before


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("left", ["by an error", "by a run whose checkpoints are gone"])
def test_a_trainer_goes_on_where_its_own_results_lie_alone(tmp_path: Path, left: str, resume: bool) -> None:
    trainer = _trainer(tmp_path)
    if left == "by an error":
        with pytest.raises(ZeroDivisionError):
            _train(trainer, tmp_path, score=lambda _, texts: [1 / (1 - trainer.current_step)] * len(texts))
    else:
        _train(trainer, tmp_path, steps=1)
        shutil.rmtree(tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 1
    _train(trainer, tmp_path, steps=2, resume=resume)
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 2


@pytest.mark.parametrize("left", ["model", "model-broken-off", "run.json"])
def test_a_fresh_run_replaces_no_results_unasked(tmp_path: Path, left: str) -> None:
    """A run whose checkpoints were removed, or a policy of the user's own under that name."""
    (tmp_path / left).mkdir() if left != "run.json" else (tmp_path / left).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"which holds '{left}', expected .* for a new run, which would replace it"):
        _train(_trainer(tmp_path), tmp_path, steps=1)
    assert sorted(tmp_path.rglob("*")) == before
    _train(_trainer(tmp_path), tmp_path, steps=1, resume=True)


@pytest.mark.parametrize("held", ["model", "model-broken-off"])
def test_a_model_that_is_no_runs_is_not_replaced_by_resuming_nothing(tmp_path: Path, held: str) -> None:
    weights = tmp_path / held / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("precious")
    with pytest.raises(ValueError, match=rf"holds a model in '{held}' and neither a checkpoint nor the run.json of"):
        _train(_trainer(tmp_path), tmp_path, steps=1, resume=True)
    assert weights.read_text() == "precious"


def test_a_card_of_the_users_may_be_in_any_code_and_a_directory(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    card = tmp_path / "model" / "README.md"
    card.write_bytes("Für Elise".encode("latin-1"))
    _train(trainer, tmp_path, steps=2)
    assert card.read_bytes().decode("latin-1") == "Für Elise"
    card.unlink()
    (card / "more").mkdir(parents=True)
    _train(trainer, tmp_path, steps=3)
    assert (card / "more").is_dir()
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 3


def test_a_disk_that_fills_while_the_tokenizer_is_saved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library does

    trainer = _trainer(tmp_path)
    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match=r"after step 1 was not saved in .*model: No space left.*resume=True"):
        _train(trainer, tmp_path, steps=1)


def test_the_working_directory_can_be_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    monkeypatch.chdir(tmp_path / "model")
    _train(trainer, tmp_path, steps=2)
    assert Path.cwd() == tmp_path / "model"


def test_settings_may_have_keys_of_any_kind(tmp_path: Path) -> None:
    _train(_trainer(tmp_path, tracker_kwargs={"a": {("b", 1): 2}}), tmp_path, steps=1)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["tracker_kwargs"] == {"a": {"('b', 1)": 2}}


def test_where_there_is_no_checkpoint_a_trainer_goes_on_after_its_own_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path)
    trainer.step(*make_batch(4))
    _train(trainer, tmp_path, steps=2, resume=True)
    assert "there is no checkpoint to resume: the run goes on after the trainer's step 1" in caplog.text


def test_two_runs_at_once_are_kept_apart(tmp_path: Path) -> None:
    """A job that was queued again, say, while the first is still writing its checkpoint."""

    def score(_: Any, texts: list[str]) -> list[float]:
        before = _files(tmp_path)
        with pytest.raises(ValueError, match="where another run is going on, expected a directory of its own for each"):
            _train(_trainer(tmp_path / "logs"), tmp_path, steps=3, resume=True)
        assert _files(tmp_path) == before
        return [0.5] * len(texts)

    _train(_trainer(tmp_path / "logs"), tmp_path, steps=2, checkpoint_every=1, score=score)
    _train(_trainer(tmp_path / "logs"), tmp_path, steps=3, resume=True)
    assert steps_done(tmp_path / "checkpoint-3") == 3


def test_the_line_of_the_last_step_that_had_no_room_is_written_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(JsonlTracker, "_append", full)
        with pytest.raises(OSError, match="No space left"):
            _train(trainer, tmp_path, steps=2)
    assert _train(trainer, tmp_path, steps=2).history == []
    assert _steps(tmp_path / FILE) == [1, 2]


def test_a_line_that_is_refused_when_there_is_room_again_holds_up_none_behind_it() -> None:
    class Tracker:
        error: Exception | None = OSError(errno.ENOSPC, "No space left on device")
        lines: tuple[int, ...] = ()

        def log(self, step: int) -> None:
            if step == 1 and self.error is not None:
                raise self.error
            self.lines += (step,)

    log, tracker = RunLog(), Tracker()
    with pytest.raises(OSError, match="No space"):
        log.log([tracker], 1)
    tracker.error = ValueError("of no kind that it knows")
    with pytest.raises(ValueError, match="of no kind"):
        log.log([tracker], 2)
    log.log([tracker], 3)
    assert tracker.lines == (2, 3)
    assert not log.misses()


def test_an_interrupt_drops_no_line_that_waits() -> None:
    class Tracker:
        errors: tuple[BaseException, ...] = (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt())
        lines: tuple[int, ...] = ()

        def log(self, step: int) -> None:
            if self.errors:
                first, *left = self.errors
                self.errors = tuple(left)
                raise first
            self.lines += (step,)

    log, tracker = RunLog(), Tracker()
    for step, error in {1: OSError, 2: KeyboardInterrupt}.items():
        with pytest.raises(error):
            log.log([tracker], step)
    log.log([tracker], 3)
    assert tracker.lines == (1, 2, 3)


def test_a_dataloader_of_any_class_has_checkpoints(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.dataloader = list(trainer.dataloader)  # which cannot be weakly referenced
    _train(trainer, tmp_path)
    assert steps_done(tmp_path / "checkpoint-2") == 2


def test_a_run_whose_rows_were_changed_between_two_parts_goes_on_with_those_of_the_second(tmp_path: Path) -> None:
    rows = _rows().to_list()
    trainer = _trainer(tmp_path, rows)
    _train(trainer, tmp_path, steps=1)
    for row in rows:
        row["input_ids"].insert(0, 4)
    _train(trainer, tmp_path, steps=2)
    _train(_trainer(tmp_path, rows), tmp_path, steps=3, resume=True)
    with pytest.raises(ValueError, match="a dataset of other prompts"):
        _train(_trainer(tmp_path, _rows()), tmp_path, steps=4, resume=True)


def test_where_directories_cannot_be_held_runs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    _train(_trainer(tmp_path), tmp_path, steps=1)
    assert steps_done(tmp_path / "checkpoint-1") == 1


def test_a_finished_run_that_is_resumed_is_left_as_it_is(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _train(_trainer(tmp_path), tmp_path, resume=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("lost", ["model", "run.json"])
def test_a_finished_run_without_its_model_is_given_one(tmp_path: Path, lost: str) -> None:
    """Killed between its last checkpoint and the end of the save behind it."""
    _train(_trainer(tmp_path), tmp_path)
    model = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / lost) if lost == "model" else (tmp_path / lost).write_text('{"steps_done": 1}')
    _train(_trainer(tmp_path), tmp_path, resume=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 2


def test_a_disk_that_fills_in_the_last_save_is_told_of(tmp_path: Path) -> None:
    """As safetensors tells of it, which knows no OSError; and once there is room, the last model is saved."""
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    before = _files(tmp_path / "model")
    save = trainer.save_pretrained

    def full(directory: Any) -> None:
        save(directory)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    trainer.save_pretrained = full
    with pytest.raises(OSError, match=r"model after step 2 was not saved in .*model: .*No space left.* before is kept"):
        _train(trainer, tmp_path, steps=2)
    assert _files(tmp_path / "model") == before
    assert steps_done(tmp_path / "checkpoint-2") == 2
    _train(_trainer(tmp_path), tmp_path, steps=2, resume=True)
    assert _files(tmp_path / "model") != before


def test_a_record_that_cannot_be_written_beside_a_new_model_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(trainer := _trainer(tmp_path), tmp_path, steps=1)
    before, record = _files(tmp_path / "model"), (tmp_path / "run.json").read_bytes()

    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(results, "write_whole", full)
    said = r"run\.json was not written: .*model holds the model after step 2, and run\.json still tells of what was"
    with pytest.raises(OSError, match=said):
        _train(trainer, tmp_path, steps=2)
    assert _files(tmp_path / "model") != before
    assert (tmp_path / "run.json").read_bytes() == record


def test_ctrl_c_in_the_last_step_interrupts_nothing(tmp_path: Path) -> None:
    def score(_: list[str], texts: list[str]) -> list[float]:
        if trainer.current_step == 1:
            signal.raise_signal(signal.SIGINT)
        return [0.5] * len(texts)

    trainer = _trainer(tmp_path)
    assert not _train(trainer, tmp_path, steps=2, score=score).interrupted
    assert steps_done(tmp_path / "checkpoint-2") == 2


def test_the_record_of_a_run_is_not_shortened(tmp_path: Path) -> None:
    _train(_trainer(tmp_path), tmp_path, steps=2)
    _train(_trainer(tmp_path), tmp_path, steps=1, resume=True)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["steps"], run["steps_done"], run["broken_off"]) == (2, 2, None)


@pytest.mark.parametrize("file", ["run.json", "model/config.json", "model/model.safetensors", "model/README.md"])
def test_a_save_that_is_cut_short_leaves_the_files_of_before(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is writing when the disk is full: no file is half of one, and the model is of one step."""
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    record = (tmp_path / "run.json").read_bytes()
    save = trainer.save_pretrained

    def full(text: str | None = None) -> None:
        raise OSError("no space left")

    if file == "run.json":
        replaced = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: full() if Path(b).name == "run.json" else replaced(a, b))
    else:

        def cut_short(directory: Any) -> None:
            save(directory)
            (Path(directory) / Path(file).name).write_bytes(b"ha")
            full()

        trainer.save_pretrained = cut_short
    with pytest.raises(OSError, match="no space left"):
        _train(trainer, tmp_path, steps=2)
    if file != "run.json":
        assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert (tmp_path / "run.json").read_bytes() == record
    monkeypatch.undo()
    trainer.save_pretrained = save
    _train(trainer, tmp_path, steps=3)
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 3
    assert not [path.name for path in tmp_path.rglob("*") if path.name[0] == "."]


def test_a_first_save_that_is_cut_short_leaves_no_model(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)

    def full(directory: Any) -> None:
        (Path(directory) / "config.json").write_text("ha")
        raise OSError("no space left")

    trainer.save_pretrained = full
    with pytest.raises(OSError, match="no space left"):
        _train(trainer, tmp_path, steps=1)
    assert not (tmp_path / "model").exists()


def test_a_model_on_another_disk_is_saved_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file crosses from one disk to another, where it could not be moved in one go."""
    (tmp_path / "disk" / "large").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "disk" / "large")
    for name in ("rename", "replace"):
        move = getattr(os, name)

        def same_disk(one: Any, other: Any, move: Any = move) -> None:
            assert len({Path(place).resolve().is_relative_to(tmp_path / "disk") for place in (one, other)}) == 1
            move(one, other)

        monkeypatch.setattr(os, name, same_disk)
    _train(_trainer(tmp_path), tmp_path / "run", steps=1, resume=True)
    assert (tmp_path / "run" / "model").is_symlink()
    assert (tmp_path / "disk" / "large" / "model.safetensors").is_file()
    assert "# model" in (tmp_path / "disk" / "large" / "README.md").read_text()


def test_a_users_files_beside_the_model_stay(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    for name in ("README.md", "notes.txt"):
        (tmp_path / "model" / name).write_text("mine")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    _train(trainer, tmp_path, steps=2)
    for name in ("README.md", "notes.txt"):
        assert (tmp_path / "model" / name).read_text() == "mine"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != weights


def test_no_weights_of_another_form_stay_beside_the_models(tmp_path: Path) -> None:
    """As they are left by a save in shards, or of an adapter: two models in one directory."""
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    written = {path.name for path in (tmp_path / "model").iterdir()}
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    others = "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"
    mine = {"model-Q4.gguf", "my-model.safetensors", "model.txt", "best"}
    for name in (*shards, *others, *mine - {"best"}, "best/model.safetensors"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("mine")
    _train(trainer, tmp_path, steps=2)
    assert {path.name for path in (tmp_path / "model").iterdir()} == written | mine
    assert (tmp_path / "model" / "best" / "model.safetensors").read_text() == "mine"


def test_frozen_weights_in_eight_bits_are_saved(tmp_path: Path) -> None:
    """What cannot be asked for infinities, and does not change, is not asked."""
    trainer = _trainer(tmp_path)
    frozen = torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    trainer.save_pretrained = lambda *_: trainer.model.register_parameter("frozen_in_eight_bits", frozen)
    _train(trainer, tmp_path, steps=1)


# --- broken off --------------------------------------------------------------------------------------------------


def _broken_in(trainer: Any, place: str, error: BaseException) -> None:
    """Raise in the next step: in the loss of its first update, or after that update."""
    if place == "before":

        def broken(*_: Any, **__: Any) -> None:
            raise error

        trainer.policy_objective = broken
    else:
        calls = 0

        def after(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise error

        trainer.optimizer.register_step_post_hook(after)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("place", ["before", "within"])
def test_weights_of_half_an_update_never_pass_for_a_model(
    tmp_path: Path, place: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path)
    _train(trainer, tmp_path, steps=1)
    before = _weights(trainer)
    model = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    _broken_in(trainer, place, error)
    if isinstance(error, KeyboardInterrupt):
        assert _train(trainer, tmp_path, steps=3).interrupted
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            _train(trainer, tmp_path, steps=3)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps_done"] == 1
    moved = place == "within"
    assert bool(run["broken_off"]) == moved == (not _same(before, _weights(trainer)))
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == model
    assert (tmp_path / "model-broken-off").exists() == moved
    assert ("weights between two steps are in" in caplog.text) == moved
    assert steps_done(tmp_path / "checkpoint-1") == 1
    assert "a part of another" not in (tmp_path / "model" / "README.md").read_text()
    if moved:
        assert (
            "and a part of another: step 2 was broken off by" in (tmp_path / "model-broken-off/README.md").read_text()
        )
        trainer.save_pretrained(tmp_path / "by-hand")
        assert "a part of another" in (tmp_path / "by-hand" / "README.md").read_text()
        again = _trainer(tmp_path)
        _train(again, tmp_path, steps=2, resume=True)
        assert not again.broken_off
        assert json.loads((tmp_path / "run.json").read_text())["broken_off"] is None


def test_ctrl_c_in_the_log_after_an_update_breaks_nothing_off(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    trainer.log_stats = interrupted
    assert _train(trainer, tmp_path, steps=3).interrupted
    assert json.loads((tmp_path / "run.json").read_text())["broken_off"] is None
    saved = load_file(tmp_path / "model" / "model.safetensors")
    name, weight = next(iter(trainer.model.pretrained_model.state_dict().items()))
    assert torch.equal(saved[name], weight)


@pytest.mark.parametrize("before", [signal.SIG_IGN, None], ids=["ignored", "not from Python"])
def test_a_ctrl_c_that_is_not_ours_is_left_alone(tmp_path: Path, before: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job in the background ignores Ctrl-C; a program around Python may handle it itself."""
    set_to: list[Any] = []
    monkeypatch.setattr(signal, "getsignal", lambda _: before)
    monkeypatch.setattr(signal, "signal", lambda _, handler: set_to.append(handler))
    assert len(_train(_trainer(tmp_path), None, steps=1).history) == 1
    assert set_to == []


def test_a_resumed_run_says_where_it_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = _trainer(tmp_path)
    save_checkpoint(trainer, tmp_path / "checkpoint")
    _train(_trainer(tmp_path), tmp_path, steps=1, resume=True)
    assert "resumed after step 0 of 1" in caplog.text
