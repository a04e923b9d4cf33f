"""The checkpoints of a run: which are kept, which is gone on from, and that a kill at no point loses all of them."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, newest_good, save_checkpoint, save_in, steps_done
from ppo_runtime.resuming import files, rotation
from ppo_runtime.resuming.sealing import read_manifest
from tests.runtime.support.sealing import make_old
from tests.runtime.support.trainers import make_batch, make_trainer


def step(trainer: PPOTrainer, score: float | None = None) -> None:
    queries, responses, scores = make_batch(seed=trainer.current_step)
    trainer.step(queries, responses, scores if score is None else [torch.tensor(score)] * len(scores))


def score_of(path: Path) -> float | None:
    manifest = read_manifest(path)
    assert manifest is not None
    return manifest.score


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- which are kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_latest_are_kept(keep_last: int, tmp_path: Path) -> None:
    trainer = make_trainer()
    for done in range(4):
        assert save_in(tmp_path, trainer, keep_last=keep_last) == tmp_path / f"checkpoint-{done}"
        kept = range(max(0, done + 1 - keep_last), done + 1)
        assert names(tmp_path) == sorted(f"checkpoint-{number}" for number in kept)
        assert newest_good(tmp_path) == tmp_path / f"checkpoint-{done}"
        step(trainer)


def test_the_best_is_kept_by_the_mean_raw_score_since_the_checkpoint_before(tmp_path: Path) -> None:
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True)
    for first, second in ((-3.0, -1.0), (-0.5, 0.5), (-9.0, 7.0), (-8.0, 6.0), (-2.0, -2.0)):
        step(trainer, first)
        step(trainer, second)
        save_in(tmp_path, trainer, keep_last=1, keep_best=True)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4"]
    assert score_of(tmp_path / "checkpoint-10") == -2.0
    assert score_of(tmp_path / "checkpoint-4") == 0.0
    step(trainer, 1.0)
    save_in(tmp_path, trainer, keep_last=1, keep_best=True)
    assert names(tmp_path) == ["checkpoint-11"], "which is the best and the latest"


def test_a_score_goes_on_with_its_run(tmp_path: Path) -> None:
    trainer = make_trainer()
    step(trainer, 3.0)
    path = save_in(tmp_path, trainer)
    other = make_trainer()
    load_checkpoint(other, path)
    save_in(tmp_path, other)
    assert score_of(path) == 3.0
    step(other, 5.0)
    assert score_of(save_in(tmp_path, other)) == 5.0


@pytest.mark.parametrize("keep_last", [0, -1, True, 1.5, None, "2"])
def test_how_many_is_a_number(keep_last: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_last is .*, expected an integer of at least 1"):
        save_in(tmp_path / "run", make_trainer(), keep_last=keep_last)
    assert names(tmp_path) == []


def test_damaged_ones_count_for_nothing_and_are_left_to_be_looked_at(tmp_path: Path) -> None:
    trainer = make_trainer()
    for _ in range(3):
        save_in(tmp_path, trainer, keep_last=3)
        step(trainer)
    (tmp_path / "checkpoint-1" / files.STATE).write_text("")
    (tmp_path / "checkpoint-2" / files.POLICY).unlink()
    save_in(tmp_path, trainer, keep_last=2)
    assert names(tmp_path) == ["checkpoint-0", "checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer()
    others = "checkpoint-5.zip", "checkpoint-best", "checkpoint-1-copy", "my-checkpoint-0", ".checkpoint-x.draft"
    for name in others:
        save_checkpoint(trainer, tmp_path / name)
    save_checkpoint(trainer, tmp_path / "checkpoint")  # of a loop of somebody's own
    (tmp_path / "checkpoint-00").mkdir()
    (tmp_path / "checkpoint-7").write_text("notes")
    before = names(tmp_path)
    for _ in range(3):
        step(trainer)
        save_in(tmp_path, trainer, keep_last=1)
    assert names(tmp_path) == sorted([*before, "checkpoint-3"])


def test_what_cannot_be_removed_is_said_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer()
    save_in(tmp_path, trainer)
    step(trainer)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(rotation, "shutil", SimpleNamespace(rmtree=busy))
        save_in(tmp_path, trainer, keep_last=1)
    assert "checkpoint-0 could not be cleared away" in caplog.text
    assert newest_good(tmp_path) == tmp_path / "checkpoint-1"
    save_in(tmp_path, trainer, keep_last=1)
    assert names(tmp_path) == ["checkpoint-1"], "half of what was removed was no checkpoint any more"


# --- which is gone on from --------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert newest_good(tmp_path) is None
    assert newest_good(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-4").write_text("")
    (tmp_path / "checkpoint-5").symlink_to("checkpoint-5")
    assert newest_good(tmp_path) is None


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_says_what_is_damaged(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer()
    for _ in range(2):
        save_in(tmp_path, trainer)
        step(trainer)
    (tmp_path / "checkpoint-1" / files.POLICY).unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert newest_good(tmp_path) == tmp_path / "checkpoint-0"
    assert ("checkpoint-1 cannot be read (policy.safetensors is missing)" in caplog.text) == (rank == "0")


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_of_an_earlier_version_is_found(old: bool, tmp_path: Path) -> None:
    trainer = make_trainer()
    step(trainer)
    save_checkpoint(trainer, tmp_path / "checkpoint")
    if old:
        make_old(tmp_path / "checkpoint")
    assert newest_good(tmp_path) == tmp_path / "checkpoint"
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.previous")
    assert newest_good(tmp_path) == tmp_path / "checkpoint"
    load_checkpoint(trainer, tmp_path / "checkpoint")
    step(trainer)
    save_in(tmp_path, trainer, keep_last=1)
    assert newest_good(tmp_path) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint", "checkpoint-2"], "back in its place, and not ours to remove"


def test_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    trainer = make_trainer()
    for done in (9, 10):
        trainer.current_step = done
        save_in(tmp_path, trainer)
    assert newest_good(tmp_path) == tmp_path / "checkpoint-10"


def test_an_abandoned_branch_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        trainer = make_trainer()
        for _ in range(4):
            step(trainer)
            save_in(tmp_path, trainer, keep_last=4)
        back = make_trainer()
        load_checkpoint(back, tmp_path / "checkpoint-1")
        step(back)
        save_in(tmp_path, back, keep_last=2)
        assert newest_good(tmp_path) == tmp_path / "checkpoint-2"
    aside = {f"checkpoint-{number}.abandoned{again}" for number in (3, 4) for again in ("", "-2")}
    assert aside | {"checkpoint-1", "checkpoint-2"} <= set(names(tmp_path))
    assert "it is checkpoint-4.abandoned now" in caplog.text


def test_a_branchs_checkpoint_of_the_same_step_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    for _ in range(2):
        step(trainer)
        save_in(tmp_path, trainer)
        save_in(tmp_path, trainer)  # its own
    back = make_trainer()
    load_checkpoint(back, tmp_path / "checkpoint-1")
    save_in(tmp_path, back)  # the same again
    assert not list(tmp_path.glob("checkpoint-1.*"))
    shutil.rmtree(tmp_path / "checkpoint-2.abandoned")
    save_in(tmp_path, trainer)
    step(back)
    save_in(tmp_path, back)
    assert steps_done(tmp_path / "checkpoint-2.abandoned") == 2
    assert "checkpoint-2 is of a branch that the run has left: it is checkpoint-2.abandoned now" in caplog.text
    assert newest_good(tmp_path) == tmp_path / "checkpoint-2"


def test_one_of_an_earlier_version_is_set_aside_by_what_it_holds(tmp_path: Path) -> None:
    trainer = make_trainer()
    step(trainer)
    save_checkpoint(trainer, tmp_path / "checkpoint-1")
    step(trainer)
    step(trainer)
    save_checkpoint(trainer, tmp_path / "checkpoint")
    back = make_trainer()
    load_checkpoint(back, tmp_path / "checkpoint-1")
    step(back)
    save_in(tmp_path, back)
    assert steps_done(tmp_path / "checkpoint.abandoned") == 3
    assert newest_good(tmp_path) == tmp_path / "checkpoint-2"


# --- kills ------------------------------------------------------------------------------------------------------------

_WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
_watcher: list[Any] = []


@cache
def _hooked() -> None:
    """Once, since a hook cannot be taken out again."""
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watcher and event in _WATCHED:
        _watcher[0](event, arguments)


@contextmanager
def snapshots(folder: Path, place: Path) -> Iterator[list[tuple[str, Path]]]:
    """What a kill would leave of a folder, at each point at which Python is about to change something in it."""
    _hooked()
    found: list[tuple[str, Path]] = []

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if str(folder) in str(arguments[0]) or event != "open":
            _watcher.clear()
            found.append((f"{event} {arguments[0]}", place / str(len(found))))
            shutil.copytree(folder, found[-1][1])
            _watcher.append(look)

    _watcher.append(look)
    try:
        yield found
    finally:
        _watcher.clear()


@pytest.mark.parametrize("kind", ["the next", "the same again", "the first", "after a killed one", "over an old one"])
def test_a_kill_at_any_point_of_a_save_leaves_a_good_checkpoint(kind: str, tmp_path: Path) -> None:
    """And the next save leaves nothing of it."""
    run = tmp_path / "run"
    run.mkdir()
    trainer = make_trainer()
    step(trainer)
    if kind == "over an old one":
        save_checkpoint(trainer, run / "checkpoint")
        (run / "checkpoint").rename(run / ".checkpoint.previous")
    elif kind != "the first":
        save_in(run, trainer, keep_last=1)
    if kind == "after a killed one":
        shutil.copytree(run / "checkpoint-1", run / ".checkpoint-2.draft")
        (run / "checkpoint-1").rename(run / ".checkpoint-1.previous")
    if kind not in ("the same again", "the first"):
        step(trainer)
    with snapshots(run, tmp_path / "killed") as left:
        save_in(run, trainer, keep_last=1)
    step(trainer)
    done = trainer.current_step
    assert len(left) > 15, [what for what, _ in left]
    for what, folder in left:
        good = newest_good(folder)
        if kind == "the first":
            assert good in (None, folder / "checkpoint-1"), what
        else:
            assert steps_done(good) in (1, done - 1), what
        assert save_in(folder, trainer, keep_last=1) == folder / f"checkpoint-{done}"
        assert [name for name in names(folder) if name != "checkpoint"] == [f"checkpoint-{done}"], what
        assert newest_good(folder) == folder / f"checkpoint-{done}"
