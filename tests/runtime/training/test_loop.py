"""The training loop: metrics on disk, a clean stop, and learning something real."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ppo_runtime.learning.guards import PATIENCE
from ppo_runtime.loop import train
from ppo_runtime.reporting.jsonl import read_jsonl
from tests.runtime.support.trainers import make_trainer

PROMPTS = ["abc", "the", "to be", "x", "hello", "no", "yes", "go"]


def _trainer(tmp_path: Path, **settings: Any) -> Any:
    from tests.runtime.support.tiny import tiny_tokenizer

    ids = [tiny_tokenizer().encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    dataset = Dataset.from_dict({"query": PROMPTS, "input_ids": ids, "unused": [0] * len(PROMPTS)})
    return make_trainer(
        dataset=dataset, batch_size=8, mini_batch_size=4, project_kwargs={"logging_dir": str(tmp_path)}, **settings
    )


def _quiet() -> Console:
    return Console(file=io.StringIO())


def _vowels(_: list[str], responses: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 8 for text in responses]


def test_every_step_is_a_line_of_metrics(tmp_path: Path) -> None:
    result = train(
        _trainer(tmp_path),
        _vowels,
        steps=3,
        generation_kwargs={"max_new_tokens": 8},
        output_dir=tmp_path,
        console=_quiet(),
    )
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(lines) == len(result.history) == 3
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line, stats in zip(lines, result.history, strict=True):
        assert line["env/reward_mean"] == pytest.approx(stats["env/reward_mean"], abs=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps_done"] == 3
    assert run["acceleration"]["backend"] == "eager"


def test_a_terminal_that_closes_ends_no_run(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(5, "Input/output error")

    console = Console(file=Closed(), force_terminal=True)
    result = train(_trainer(tmp_path), _vowels, steps=2, output_dir=tmp_path, console=console)
    assert len(result.history) == 2
    assert not result.interrupted
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 2


def test_a_reader_of_standard_error_that_goes_away_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with ``2>&1 | head``: neither rich's bar nor transformers' may end the run, nor silence standard output."""

    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    trainer, before = _trainer(tmp_path), transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        with monkeypatch.context() as patched:
            patched.setattr("sys.stderr", Broken())
            console = Console(stderr=True, force_terminal=True)
            result = train(trainer, _vowels, steps=2, output_dir=tmp_path, console=console)
        assert transformers_logging.is_progress_bar_enabled(), "the user's own bars are as before"
    finally:
        if not before:
            transformers_logging.disable_progress_bar()
    assert len(result.history) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    os.write(1, b"still here")
    assert "still here" in capfd.readouterr().out


def test_ctrl_c_leaves_metrics_and_model(tmp_path: Path) -> None:
    calls = 0

    def interrupting(queries: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return _vowels(queries, responses)

    result = train(
        _trainer(tmp_path),
        interrupting,
        steps=10,
        generation_kwargs={"max_new_tokens": 4},
        output_dir=tmp_path,
        console=_quiet(),
    )
    assert result.interrupted
    assert len(result.history) == len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert json.loads((tmp_path / "run.json").read_text())["steps_done"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_bad_score_saves_what_was_done_and_says_which(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)

    def failing(queries: list[str], responses: list[str]) -> list[float]:
        return [0.5 if trainer.current_step == 0 else float("nan")] * len(responses)

    with pytest.raises(ValueError, match=r"scores\[0\] is nan"):
        train(trainer, failing, steps=2, output_dir=tmp_path, console=_quiet())
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_trainer_without_dataset_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"has no dataset.*; pass dataset= when it is made$"):
        train(make_trainer(), _vowels, steps=1, console=_quiet())


def test_a_dataloader_without_batches_is_an_error_and_not_an_endless_loop() -> None:
    trainer = make_trainer()
    trainer.dataloader = []
    with pytest.raises(ValueError, match="gave no batch"):
        train(trainer, _vowels, steps=1, console=_quiet())


def test_the_score_climbs(tmp_path: Path) -> None:
    """Forty steps on a random model teach it a letter: a whole-path check that no unit test replaces."""
    trainer = _trainer(tmp_path, learning_rate=1e-2, init_kl_coef=0.01, seed=1)
    result = trainer.train(
        lambda _, texts: [text.count("e") / 8 for text in texts],
        steps=40,
        generation_kwargs={"max_new_tokens": 8},
        console=_quiet(),
    )
    scores = torch.tensor([stats["env/reward_mean"] for stats in result.history])
    assert scores[-5:].mean() > scores[:5].mean() + 0.3


@pytest.mark.parametrize("unusable", [float("nan"), 1e20])
def test_a_batch_that_cannot_be_trained_on_is_dropped_where_that_is_asked_for(
    unusable: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one takes its place; nothing of it is in the statistics, the weights or the log but where it lies."""
    calls = 0

    def score(_: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return [unusable if calls in (1, 3) else 0.1 * calls, *_vowels(_, responses[1:])]

    trainer = _trainer(tmp_path, on_nonfinite="drop")
    result = train(trainer, score, steps=3, output_dir=tmp_path, console=_quiet())
    assert (calls, trainer.current_step, len(result.history)) == (5, 3, 3)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert caplog.text.count("is dropped: scores[0] is") == 2
    assert sorted(path.name for path in tmp_path.glob("not-finite/*.json")) == ["step-1.json", "step-2.json"]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_batches_are_not_dropped_for_ever_nor_for_other_reasons(tmp_path: Path) -> None:
    trainer, calls = _trainer(tmp_path, on_nonfinite="drop"), []

    def score(_: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        return [float("nan")] * len(responses)

    with pytest.raises(ValueError, match=r"scores\[0\] is nan"):
        train(trainer, score, steps=3, console=_quiet())
    assert len(calls) == PATIENCE
    with pytest.raises(ValueError, match="returned 1 scores, expected 8"):
        train(trainer, lambda *_: [0.5], steps=3, console=_quiet())


def test_a_batch_is_dropped_after_a_step_that_was_broken_off_and_caught(tmp_path: Path) -> None:
    trainer, calls = _trainer(tmp_path, on_nonfinite="drop"), []
    trainer.broken_off = "step 1 was broken off by RuntimeError after 1 steps of the optimiser"

    def score(_: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        return [float("nan") if len(calls) == 1 else 0.5] * len(responses)

    assert len(train(trainer, score, steps=1, console=_quiet()).history) == 1


def test_all_batches_dropped_in_one_step_are_kept_for_inspection(tmp_path: Path) -> None:
    calls = 0

    def score(queries: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return [float("nan")] * len(responses) if calls <= 2 else _vowels(queries, responses)

    trainer = _trainer(tmp_path, on_nonfinite="drop")
    train(trainer, score, steps=1, generation_kwargs={"max_new_tokens": 3}, console=_quiet())
    kept = {path.name for path in (tmp_path / "not-finite").iterdir()}
    assert kept == {f"step-1{which}.{ending}" for which in ("", "-2") for ending in ("json", "safetensors")}
