"""Weights & Biases without network, and the table of texts in every tracker."""

import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from ppo_runtime.loop import train
from ppo_runtime.reporting.jsonl import read_jsonl
from ppo_runtime.reporting.tables import rollout_table
from tests.runtime.support.tiny import tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer

TEXTS = {"query": ["a | b"] * 6, "response": ["c\nd"] * 6, "ref": [0.5] * 6}


def logged(tmp_path: Path, **settings: Any) -> Any:
    trainer = make_trainer(
        exp_name="run", tracker_project_name="prose", project_kwargs={"logging_dir": str(tmp_path)}, **settings
    )
    for _ in range(2):
        queries, responses, scores = make_batch()
        stats = trainer.step(queries, responses, scores)
        trainer.log_stats(stats, TEXTS, scores, columns_to_log=["query", "response", "ref", "absent"])
    trainer.close()
    return trainer


@pytest.mark.timeout(300)
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # A busy machine may need longer than its 30 seconds to start the process that writes.
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "200")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "200")
    logged(tmp_path, log_with="wandb", tracker_kwargs={"wandb": {"name": "first", "tags": ["tiny"]}})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    # The service that writes the file may be done a moment after finish() has returned.
    patience = time.monotonic() + 60
    while b"game_log" not in (content := record.read_bytes()) and time.monotonic() < patience:
        time.sleep(0.1)
    for text in (b"prose", b"first", b"ppo/loss/total", b"env/reward_mean", b"game_log", b"learning_rate"):
        assert text in content, text
    tables = sorted((run / "files" / "media" / "table").glob("game_log_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["query", "response", "ref", "reward"]
    assert table["data"][0][:3] == ["a | b", "c\nd", 0.5]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2, "the JSONL file is written beside it"


class FakeRun:
    """What a Weights & Biases run is asked to do."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[int | None] = []

    def log(self, line: dict[str, Any], step: int) -> None:
        self.lines.append((step, line))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished.append(exit_code)


@pytest.mark.parametrize("fails", [None, "score", "save", "ctrl-c"])
def test_wandb_is_told_how_a_run_ended(fails: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within somebody's ``except`` as well, whose error is none of the run's."""
    fake, run = ModuleType("wandb"), FakeRun()
    fake.__dict__.update(init=lambda **_: run, Table=lambda columns, data: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows = Dataset.from_dict({"query": ["a"] * 6, "input_ids": [[5, 6]] * 6})
    trainer = make_trainer(dataset=rows, log_with="wandb", project_kwargs={"logging_dir": str(tmp_path)})

    def fail(*_: Any) -> Any:
        raise {"ctrl-c": KeyboardInterrupt}.get(str(fails), RuntimeError("mine"))

    if fails == "save":
        trainer.save_pretrained = fail
    score = fail if fails in ("score", "ctrl-c") else lambda _, texts: [0.5] * len(texts)
    options = {"steps": 1, "output_dir": tmp_path / "o", "console": Console(file=io.StringIO())}
    try:
        raise KeyError
    except KeyError:
        if fails in ("score", "save"):
            with pytest.raises(RuntimeError, match="mine"):
                train(trainer, score, **options)
        else:
            train(trainer, score, **options)
    assert run.finished == [1 if fails in ("score", "save") else None]


def test_wandb_gets_steps_curves_table_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, settings = FakeRun(), {}
    fake: Any = ModuleType("wandb")
    fake.Table = lambda columns, data: (columns, data)

    def init(**kwargs: Any) -> FakeRun:
        settings.update(kwargs)
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer = logged(tmp_path, log_with="wandb", tracker_kwargs={"entity": "us"})
    assert settings["project"] == "prose"
    assert settings["entity"] == "us"
    assert settings["config"]["batch_size"] == trainer.config.batch_size
    assert [step for step, _ in run.lines] == [1, 2]
    columns, data = run.lines[0][1]["game_log"]
    assert columns == ["query", "response", "ref", "reward"]
    assert len(data) == 6
    assert run.lines[0][1]["env/reward_mean"] == pytest.approx(float(torch.stack(make_batch()[2]).mean()), abs=1e-6)
    assert run.finished == [None]


def test_tensorboard_has_the_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, log_with="tensorboard")
    (events,) = tmp_path.glob("events.*")
    read = EventAccumulator(str(events)).Reload()
    assert [event.step for event in read.Scalars("objective/kl")] == [1, 2]
    first, *_ = read.Tensors("game_log/text_summary")
    assert r"| a \| b | c<br>d | 0.5 |" in first.tensor_proto.string_val[0].decode()


def test_jsonl_has_the_table_without_any_tracker(tmp_path: Path) -> None:
    logged(tmp_path)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["tables"]["game_log"][0]["query"] == "a | b"


def test_columns_of_tensors_become_texts() -> None:
    tokenizer = tiny_tokenizer()
    ids = [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in ("ab", "c")]
    batch = {
        "query": ids,
        "input_ids": [row.tolist() for row in ids],
        "padded": torch.stack([ids[0], ids[0]]),
        "score": torch.tensor([0.5, 1.5]),
        "logits": [torch.tensor([0.5, 1.0])] * 2,
        "text": ["x", "y"],
    }
    first, second = rollout_table(batch, [*batch, "absent"], [1.0, 2.0], tokenizer)
    assert first == {
        "query": "ab",
        "input_ids": "ab",
        "padded": "ab",
        "score": 0.5,
        "logits": "[0.5, 1.0]",
        "text": "x",
        "reward": 1.0,
    }
    assert second["query"] == "c"
    assert second["reward"] == 2.0


def test_a_column_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch\['query'\] has 1 entries, expected 2 like rewards"):
        rollout_table({"query": ["a"]}, ["query"], [1.0, 2.0], None)


@pytest.mark.parametrize("kind", ["list of tensors", "one tensor", "numbers", "1-element tensors"])
def test_rewards_in_any_customary_form(kind: str, tmp_path: Path) -> None:
    values = [0.5, -1.0, 2.0, 0.0, 1.0, 3.5]
    rewards: Any = {
        "list of tensors": [torch.tensor(value) for value in values],
        "one tensor": torch.tensor(values),
        "numbers": values,
        "1-element tensors": [torch.tensor([value], dtype=torch.bfloat16) for value in values],
    }[kind]
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    trainer.log_stats({}, {"query": ["q"] * 6}, rewards)
    trainer.close()
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line["env/reward_mean"] == 1.0
    assert [row["reward"] for row in line["tables"]["game_log"]] == values
