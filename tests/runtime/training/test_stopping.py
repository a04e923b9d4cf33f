"""Signals that ask a run to stop: what the first and the second do, and what is as before afterwards."""

import io
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from ppo_runtime import loop
from ppo_runtime.common.signals import stop_asked
from ppo_runtime.learning import inspection
from ppo_runtime.loop import train
from ppo_runtime.reporting.jsonl import read_jsonl
from tests.runtime.support.trainers import make_trainer

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """As in a program that is started from a terminal, whoever has started this one."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _trainer(home: Path) -> Any:
    rows = Dataset.from_dict({"query": ["q"] * 8, "input_ids": [[5 + row] for row in range(8)]})
    settings = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "horizon": 20}
    return make_trainer(dataset=rows, project_kwargs={"logging_dir": str(home)}, **settings)


def _train(trainer: Any, home: Path, *, steps: int = 4, score: Any = None, **options: Any) -> Any:
    return train(
        trainer,
        score or (lambda _, texts: [len(set(text)) / 4 for text in texts]),
        steps=steps,
        generation_kwargs={"max_new_tokens": 3},
        output_dir=home,
        console=Console(file=io.StringIO()),
        **options,
    )


def _sending(number: int, *, in_step: int) -> Any:
    """A score function during which a signal arrives."""
    calls = 0

    def score(_: list[str], texts: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == in_step:
            signal.raise_signal(number)
        return [len(set(text)) / 4 for text in texts]

    return score


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_finishes_the_step_and_the_run_resumes_bit_for_bit(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = _trainer(tmp_path / "straight")
    _train(straight, tmp_path / "straight")
    before = [signal.getsignal(number) for number in SIGNALS]
    home = tmp_path / "stopped"
    stopped = _train(_trainer(home), home, score=_sending(number, in_step=2))
    assert (stopped.interrupted, stopped.signal, len(stopped.history)) == (True, number, 2)
    assert f"{signal.Signals(number).name}: finishing this step, then stopping" in caplog.text
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert (home / "model" / "config.json").is_file()
    resumed = _trainer(home)
    finished = _train(resumed, home, resume=True)
    assert (finished.interrupted, finished.signal) == (False, 0)
    assert [line["step"] for line in read_jsonl(home / "metrics.jsonl")] == [1, 2, 3, 4]
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("number", SIGNALS)
def test_after_the_first_signal_the_second_does_what_it_did_before(number: int, tmp_path: Path) -> None:
    """SIGTERM ends the process by itself then; Ctrl-C breaks the step off."""
    before = [signal.getsignal(number) for number in SIGNALS]
    handlers: list[Any] = []

    def score(_: list[str], texts: list[str]) -> list[float]:
        assert [signal.getsignal(number) for number in SIGNALS] != before
        signal.raise_signal(number)
        handlers.extend(signal.getsignal(number) for number in SIGNALS)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    stopped = _train(_trainer(tmp_path), tmp_path, score=score)
    assert handlers == before
    assert (stopped.interrupted, stopped.signal, stopped.history) == (True, signal.SIGINT, [])


def test_a_run_that_is_stopped_while_a_batch_is_kept_counts_its_step_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second step, of which an update was left out."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    straight = _trainer(tmp_path / "straight")
    _train(straight, tmp_path / "straight")
    trainer = _trainer(home := tmp_path / "stopped")
    backward = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal backward
        backward += 1
        return gradient * (float("nan") if backward == 3 else 1.0)

    trainer.config.on_nonfinite = "drop"
    trainer.model.v_head.summary.weight.register_hook(spoil)
    with monkeypatch.context() as patched:
        patched.setattr(inspection, "keep_batch", interrupt)
        stopped = _train(trainer, home, checkpoint_every=1)
    assert (stopped.interrupted, trainer.current_step, trainer.broken_off) == (True, 2, None)
    assert json.loads((home / "run.json").read_text())["steps_done"] == 2
    resumed = _trainer(home)
    assert len(_train(resumed, home, resume=True).history) == 3
    assert [line["step"] for line in read_jsonl(home / "metrics.jsonl")] == [1, 2, 3, 4]
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_signal_during_a_save_stops_right_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = loop._keep

    def signalled(*given: Any, **kept: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        keep(*given, **kept)

    monkeypatch.setattr(loop, "_keep", signalled)
    assert len(_train(_trainer(tmp_path), tmp_path, checkpoint_every=1).history) == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_last_step_or_the_last_save_interrupts_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path)
    save = trainer.save_pretrained

    def signalled(directory: Any) -> None:
        signal.raise_signal(number)
        save(directory)

    trainer.save_pretrained = signalled
    result = _train(trainer, tmp_path, steps=1)
    assert not result.interrupted
    assert (tmp_path / "model" / "config.json").is_file()


def test_handlers_are_put_back_after_an_error(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError):
        _train(_trainer(tmp_path), tmp_path, score=lambda *_: 1 / 0)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_that_are_ignored_stay_so(tmp_path: Path) -> None:
    """A job in the background ignores Ctrl-C, and ``nohup`` the closing of its terminal."""
    before = signal.signal(SIGNALS[-1], signal.SIG_IGN)
    try:
        assert not _train(_trainer(tmp_path), tmp_path, steps=2, score=_sending(SIGNALS[-1], in_step=1)).interrupted
        assert signal.getsignal(SIGNALS[-1]) is signal.SIG_IGN
    finally:
        signal.signal(SIGNALS[-1], before)


def test_a_thread_trains_without_handling_signals(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[Any] = []

    def run() -> None:
        seen: list[Any] = []

        def score(_: list[str], texts: list[str]) -> list[float]:
            seen.extend(signal.getsignal(number) for number in SIGNALS)
            return [0.5] * len(texts)

        found.extend([_train(_trainer(tmp_path), tmp_path, steps=1, score=score), seen])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not found[0].interrupted
    assert found[1] == before


def test_a_process_that_a_score_function_has_forked_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool ends its workers by SIGTERM; one that went on would be waited for without end."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with stop_asked("this", says=True) as stop:
            monkeypatch.setattr(os, "getpid", lambda: -1)
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
            assert not stop.signal
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_one_rank_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), stop_asked("this", says=False) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert not caplog.text


def test_the_lines_of_a_checkpoints_steps_are_on_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, save, metrics = os.fsync, loop.save_in, tmp_path / "metrics.jsonl"

    def synced(descriptor: int) -> None:
        if os.path.sameopenfile(descriptor, opened.fileno()):
            order.append(f"{metrics.read_bytes().count(os.linesep.encode())} lines")
        sync(descriptor)

    def saved(*given: Any, **kept: Any) -> Any:
        order.append("checkpoint")
        return save(*given, **kept)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(loop, "save_in", saved)
    with metrics.open("ab") as opened:
        _train(_trainer(tmp_path), tmp_path, steps=2, checkpoint_every=1)
    assert order == ["1 lines", "checkpoint", "2 lines", "checkpoint"]
