"""The demo from the command line, small: every file it promises, the same run for the same seed, and its errors."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import ppo_core
import ppo_runtime
from ppo_runtime import loop
from ppo_runtime.accel.backends import choose
from ppo_runtime.cli import app
from ppo_runtime.demo import run, standing
from ppo_runtime.demo.options import remember, settle
from ppo_runtime.models import gguf as convert
from ppo_runtime.reporting.jsonl import read_jsonl
from tests.runtime.support.processes import ROOT, ends_of_ranks
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import untimed

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


def _words(result: Any) -> str:
    """What was printed, whatever the width it was wrapped to."""
    return " ".join((result.output + result.stderr).split())


HOSTILE = r"[/b] [red]not red[/] [link=x] [1] \[ ]"


def test_what_is_not_ours_is_printed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model output, prompts and paths with square brackets, which rich reads as its markup."""
    evaluate = run.evaluate

    def hostile(*arguments: Any) -> Any:
        texts = [HOSTILE] * 64
        return attrs.evolve(evaluate(*arguments), sampled=texts, greedy=texts)

    monkeypatch.setattr(run, "evaluate", hostile)
    monkeypatch.setenv("COLUMNS", "400")
    home = tmp_path / "[bold]home[/b]"
    tiny_model("llama", max_position_embeddings=128).save_pretrained(home / "mine")
    tiny_tokenizer().save_pretrained(home / "mine")
    small = ["--model", str(home / "mine"), "--accel", "eager"]
    shown = _words(_demo(home / "run", "--steps", "1", *small))
    assert shown.count(HOSTILE) == 6
    for place in (f"model {home / 'mine'}", f"output {home / 'run'}", f"Saved to {home / 'run'}:"):
        assert place in shown
    refused = _words(_demo(home / "run", "--steps", "1", *small, exit_code=2))
    assert f"output {home / 'run'} is not empty" in refused
    assert f"--resume --output {home / 'run'}" in refused


@pytest.mark.parametrize("command", ["demo", "convert"])
def test_advice_keeps_its_brackets(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ImportError("pip install 'ppo-core[ipex]'")

    monkeypatch.setattr(run, "run_demo", fail)
    monkeypatch.setattr(convert, "convert_gguf", fail)
    arguments = ["--output", str(tmp_path / "o")] if command == "demo" else ["a.gguf", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 2
    assert "error: pip install 'ppo-core[ipex]'" in _words(result)


def test_where_a_conversion_went_keeps_its_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "convert_gguf", lambda *_: None)
    result = CliRunner().invoke(app, ["convert", "a.gguf", "[x]/y"])
    assert _words(result) == "Wrote [x]/y"


def test_a_run_goes_on_as_it_was_begun_and_stops_when_it_is_done(tmp_path: Path) -> None:
    """Two steps; asked again for two: nothing. For three: one more of the same size, and the report is of all."""
    output = tmp_path / "run"
    _demo(output, "--steps", "2", "--seed", "3", "--accel", "eager")
    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    again = CliRunner().invoke(app, ["demo", "--resume", "--output", str(output)])
    assert again.exit_code == 0, again.output
    assert f"is finished, after step 2. For more steps: --resume --output {output} --steps 4" in _words(again)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == files
    for option, value, was in (
        ("--batch-size", "8", "4"),
        ("--seed", "4", "3"),
        ("--new-tokens", "7", "6"),
        ("--target", "9", "8.0"),
        ("--learning-rate", "0.1", "0.0003"),
        ("--model", str(tmp_path), "the embedded one"),
    ):
        other = CliRunner().invoke(app, ["demo", "--resume", "--output", str(output), option, value])
        assert other.exit_code == 2
        assert f"the run in {output} was begun with {was}; leave {option} out" in _words(other)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == files
    more = CliRunner().invoke(app, ["demo", "--resume", "--output", str(output), "--steps", "3", "--accel", "eager"])
    assert more.exit_code == 0, more.output
    assert [line["step"] for line in read_jsonl(output / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((output / "report.json").read_text())["steps"] == 3
    straight = tmp_path / "straight"
    _demo(straight, "--steps", "3", "--seed", "3", "--accel", "eager")
    ends = [untimed(read_jsonl(place / "metrics.jsonl")[-1]) for place in (output, straight)]
    assert ends[0] == ends[1]


def test_an_interrupted_run_goes_on_by_the_advice_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    score = run.sentiment()
    calls = 0

    def interrupting() -> Any:
        def scores(texts: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:  # twice before, for the evaluation
                signal.raise_signal(signal.SIGINT)
            return score(texts)

        return scores

    monkeypatch.setattr(run, "sentiment", interrupting)
    shown = _words(_demo(output, "--steps", "2", "--accel", "eager", exit_code=130))
    advice = f"Go on with --resume --output {output}"
    assert f"Stopped after step 1 of 2, with model, metrics.jsonl, curves.png in {output}. Go on" in shown
    assert advice in shown
    result = CliRunner().invoke(app, ["demo", *advice.removeprefix("Go on with ").split()])
    assert result.exit_code == 0, result.output
    assert json.loads((output / "report.json").read_text())["steps"] == 2


def test_a_run_that_is_stopped_before_its_first_step_names_no_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_one_step", interrupt)
    shown = _words(_demo(tmp_path / "run", "--steps", "2", "--accel", "eager", exit_code=130))
    assert "Stopped after step 0 of 2. Go on with --resume" in shown


@pytest.mark.parametrize("options", [["--batch-size", "3"], ["--accel", "bogus"], ["--steps", "0"]])
def test_what_all_ranks_refuse_is_said_once(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ppo_runtime", "demo", "--output", str(tmp_path / "run"), *options]
    first, second = ends_of_ranks(command, limit=120)
    assert first.code == second.code == 2
    assert options[0].removeprefix("--") in first.complaint
    assert second.complaint == ""


def test_the_ways_out_do_not_lead_in_a_circle(tmp_path: Path) -> None:
    """A directory with files that are no run's."""
    (tmp_path / "metrics.jsonl").touch()
    fresh = _words(_demo(tmp_path, "--steps", "1", exit_code=2))
    assert "is not empty" in fresh
    assert "--resume" not in fresh
    resumed = _words(_demo(tmp_path, "--resume", exit_code=2))
    assert "holds no run to resume, only other files; choose another with --output, or remove it" in resumed
    assert "holds no run to resume; start without" in _words(_demo(tmp_path / "no", "--resume", exit_code=2))
    assert "--resume is given without --output" in _words(CliRunner().invoke(app, ["demo", "--resume"]))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With its options, by the advice that a fresh start gives."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(run, "train", killed)
        with pytest.raises(Killed):
            CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "run"), *SMALL, "--steps", "1"])
    fresh = _words(_demo(tmp_path / "run", "--steps", "1", exit_code=2))
    advice = f"or go on with its run: --resume --output {tmp_path / 'run'}"
    assert advice in fresh
    result = CliRunner().invoke(app, ["demo", *advice.split(": ")[1].split(), "--accel", "eager"])
    assert result.exit_code == 0, result.output
    assert "to resume: the run starts from the beginning" in caplog.text
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["batch_size"] == 4
    assert (tmp_path / "run" / "metrics-1.jsonl").read_text().startswith('{"step": 1}\n')


def test_the_demo_on_two_ranks_says_everything_once(tmp_path: Path) -> None:
    """By torchrun, and without a name for its directory, which the ranks agree on."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "ppo_runtime", "demo", *SMALL, "--steps", "1", "--accel", "eager"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (output,) = (tmp_path / "runs").iterdir()
    for once in (
        "PPO: more cheerful prose",
        "on each of 2 ranks",
        "Held-out prompts, sampled",
        f"Saved to runs/{output.name}",
    ):
        assert said.count(once) == 1, said
    (line,) = read_jsonl(output / "metrics.jsonl")
    assert line["step"] == 1
    assert sorted(path.name for path in output.glob("checkpoint*/rank-*.json")) == ["rank-0.json", "rank-1.json"]
    AutoModelForCausalLM.from_pretrained(output / "model")


def test_one_step_is_called_one_step(tmp_path: Path) -> None:
    shown = _words(_demo(tmp_path / "run", "--steps", "1", "--accel", "eager"))
    assert "1 step of 4 continuations" in shown
    assert not re.search(r"\b1 steps", shown)


def test_advice_to_install_the_extension_is_given_at_most_once(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        shown = _words(_demo(tmp_path / "run", "--steps", "1")) + caplog.text
    assert shown.count("ppo-core[ipex]") <= (len(choose("auto", strict=False).versions) > 1)


@pytest.mark.parametrize("command", [["-m", "ppo_runtime"], ["-m", "ppo_runtime.demo"]])
def test_help_from_a_shell(command: list[str]) -> None:
    """Without loading torch, so that it is there at once."""
    code = f"import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module({command[1]!r}, run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "Usage: python -m ppo_runtime" in done.stdout or "Usage: ppo-core" in done.stdout
    assert done.stdout.split()[-1] == "False"
    assert "--resume" in done.stdout or command[1] == "ppo_runtime"


def test_the_version_is_the_same_everywhere(tmp_path: Path) -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.*)"', project, re.MULTILINE)
    assert stated
    assert ppo_core.__version__ == ppo_runtime.__version__ == stated[1]
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"ppo-core {stated[1]}\n")


@pytest.mark.parametrize("options", [["--accel", "bogus"], ["--batch-size", "3"], ["--new-tokens", "5000"]])
def test_a_refused_start_leaves_nothing_behind(options: list[str], tmp_path: Path) -> None:
    """The same output directory then serves a start with better options."""
    _demo(tmp_path / "run", "--steps", "1", *options, exit_code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", [".", "run", "one/two"])
def test_a_place_that_cannot_be_written_is_named_first(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load", None)  # it would not come that far
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"output .*{re.escape(str(Path('file') / below))}, expected"):
        run.run_demo(settle({"accel": "eager"}, output=tmp_path / "file" / below, resume=False), Console())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match="cannot be written"):
        run.run_demo(settle({"accel": "eager"}, output=tmp_path / "no" / below, resume=False), Console())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("damage", ["", "[]", '{"steps": "x"}', '{"batch_size": nu'])
def test_damaged_options_are_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(damage)
    with pytest.raises(ValueError, match=r"options\.json is damaged, .* remove it"):
        settle({}, output=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("model", 3), ("model", ""), ("model", []), ("seed", -1), ("seed", True), ("seed", 1.5), ("seed", None)),
        *(("steps", 0), ("steps", True), ("steps", 2.0), ("steps", None), ("batch_size", 0), ("batch_size", 3)),
        *(("batch_size", False), ("new_tokens", 0), ("new_tokens", True), ("new_tokens", "6"), ("accel", 3)),
        *(("learning_rate", v) for v in (True, 0, -1e-4, float("nan"), float("inf"), 10**400, "1e-4")),
        *(("target", v) for v in (True, 0, -8.0, float("nan"), float("inf"), None, [8.0])),
        ("accel", None),
    ],
)
def test_options_that_were_edited_are_answered_by_name(name: str, value: Any, tmp_path: Path) -> None:
    """With a reason, and before anything is loaded; the same on the command line, as far as that takes them."""
    (tmp_path / "options.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"options\.json is damaged, {name} is .*, expected .*; remove it"):
        settle({}, output=tmp_path, resume=True)
    if value is not None and name != "model":
        with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} is .*, expected "):
            settle({name: value}, output=tmp_path, resume=False)


@pytest.mark.parametrize(
    "report", ["[]", "{}", "3", '{"steps": "2"}', '{"steps": null}', '{"steps": true}', "", "\xff"]
)
def test_a_report_of_another_shape_is_none(report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written anew."""
    (tmp_path / "report.json").write_bytes(report.encode("latin-1"))
    monkeypatch.setattr(standing, "steps_made", lambda _: 1)
    assert standing.finished(settle({"steps": 1}, output=tmp_path, resume=False), Console()) is None


def test_a_finished_run_without_metrics_says_what_is_missing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    _demo(output, "--steps", "1", "--accel", "eager")
    (output / "report.json").unlink()
    (output / "metrics.jsonl").unlink()
    again = CliRunner().invoke(app, ["demo", "--resume", "--output", str(output)])
    assert again.exit_code == 2
    assert "has no step, expected those of the run" in _words(again)


def test_a_missing_part_shows_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "ppo-core[demo]" in _words(_demo(tmp_path / "run", "--steps", "1", exit_code=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [None, 2])
def test_a_run_goes_on_with_as_many_sequences_on_another_number_of_ranks(
    given: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(settle({"batch_size": 4}, output=tmp_path, resume=False))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settle({"batch_size": given}, output=tmp_path, resume=True).batch_size == 2
    with pytest.raises(ValueError, match=r"--batch-size is 4, and the run .* was begun with 2"):
        settle({"batch_size": 4}, output=tmp_path, resume=True)
    monkeypatch.delenv("WORLD_SIZE")
    assert settle({"batch_size": 4}, output=tmp_path, resume=True).batch_size == 4
