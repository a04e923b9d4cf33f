"""The demo from the command line, small: every file it promises, the same run for the same seed, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ppo_runtime.accel import choose
from ppo_runtime.cli import app
from ppo_runtime.tracking import read_jsonl
from tests.runtime.tiny import tiny_model, tiny_tokenizer
from tests.runtime.trainers import untimed

SMALL = ["--batch-size", "4", "--new-tokens", "6"]


def _demo(output: Path, *options: str, exit_code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["demo", "--output", str(output), *SMALL, *options])
    assert result.exit_code == exit_code, result.output
    return result


def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    output = tmp_path / "run"
    shown = _demo(output, "--steps", "2", "--accel", "eager").output
    for promised in ("Held-out prompts, sampled", "held-out prompts, greedy", "before", "after"):
        assert promised in shown
    assert len(read_jsonl(output / "metrics.jsonl")) == 2
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = json.loads((output / "samples.json").read_text())
    assert len(samples) == 64
    report = json.loads((output / "report.json").read_text())
    assert report["max_first_minibatch_ratio_deviation"] <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    ids = tokenizer("It was a", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path: Path) -> None:
    def first_line(name: str, seed: str) -> dict[str, Any]:
        _demo(tmp_path / name, "--steps", "1", "--seed", seed, "--accel", "eager")
        line = read_jsonl(tmp_path / name / "metrics.jsonl")[0]
        return untimed(line)

    assert first_line("a", "1") == first_line("b", "1")
    assert first_line("c", "2")["tables"] != first_line("d", "1")["tables"]


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=128)
    model.save_pretrained(tmp_path / "mine")
    tiny_tokenizer().save_pretrained(tmp_path / "mine")
    _demo(tmp_path / "run", "--model", str(tmp_path / "mine"), "--steps", "1", "--accel", "eager")
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_second_run_never_mixes_with_a_first(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("precious")
    result = _demo(tmp_path, "--steps", "1", exit_code=2)
    assert "is not empty" in " ".join((result.output + result.stderr).split())
    assert (tmp_path / "kept").read_text() == "precious"


def test_a_bad_option_is_named(tmp_path: Path) -> None:
    result = _demo(tmp_path / "run", "--accel", "tpu", exit_code=2)
    assert "accel is 'tpu'" in " ".join((result.output + result.stderr).split())


def test_doctor_names_the_backend() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "accel=auto" in result.output


@pytest.mark.skipif(choose("auto", strict=False).backend != "ipex", reason="this lane has no Intel extension")
def test_ipex_serves_the_reference_with_eager_scores(tmp_path: Path) -> None:
    lines = {}
    for accel in ("ipex", "eager"):
        _demo(tmp_path / accel, "--steps", "1", "--accel", accel)
        lines[accel] = read_jsonl(tmp_path / accel / "metrics.jsonl")[0]
        report = json.loads((tmp_path / accel / "report.json").read_text())
        assert report["acceleration"]["backend"] == accel
    for name in ("env/reward_mean", "objective/kl", "ppo/mean_non_score_reward", "ppo/returns/mean"):
        assert lines["ipex"][name] == pytest.approx(lines["eager"][name], abs=1e-5), name
