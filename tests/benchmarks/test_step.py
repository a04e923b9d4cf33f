"""The benchmark of whole steps counts, books and sums up rightly; nothing here is timed, and no peer is needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_runtime.models.references import create_reference_model
from tests.benchmarks.step import __main__ as command
from tests.benchmarks.step import older, ours, sameness, table, worker
from tests.benchmarks.step import workload as w
from tests.benchmarks.step.flops import Matrices, generation_flops, matrices_of, step_flops
from tests.benchmarks.step.parts import FORWARD, HEAD, OTHER, PARTS, SCORING, Stopwatch, watched
from tests.benchmarks.step.worker import measure
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer

TINY = w.Work(batch=4, mini_batch=2, longest=12)


@pytest.fixture
def directory(tmp_path: Path) -> str:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


# How much arithmetic.


class Products(TorchDispatchMode):
    """Counts the arithmetic of matrix products, as they are run."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out


def trunk_and_head(model: Any, tokens: int, response_tokens: int) -> torch.Tensor:
    """Something that depends on all tokens through the trunk, and on some of them through the head."""
    hidden = model.base_model(input_ids=torch.arange(tokens)[None] % 50, use_cache=False).last_hidden_state[0]
    return model.get_output_embeddings()(hidden[:response_tokens]).sum() + hidden.sum()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_formula_is_what_a_step_without_waste_runs(family):
    """Two passes without gradient and a pass with it per epoch, on one row without padding, are counted exactly."""
    model, epochs = tiny_model(family, tie_word_embeddings=False), 3
    model.get_input_embeddings().requires_grad_(True)  # so that the first layer's input has a gradient as well
    with Products() as products:
        with torch.no_grad():
            for _ in ("policy", "reference"):
                trunk_and_head(model, 11, 5)
        for _ in range(epochs):
            trunk_and_head(model, 11, 5).backward()
    needed = step_flops(matrices_of(model), tokens=11, response_tokens=5, epochs=epochs)
    assert needed == products.flops


def test_shared_layers_are_needed_once_and_a_frozen_head_gives_its_input_a_gradient():
    model = tiny_model("llama", layers=3, tie_word_embeddings=True)
    whole = matrices_of(model)
    create_reference_model(model, 2)
    shared = matrices_of(model)
    assert shared.frozen == 2 * shared.trained == whole.trained * 2 // 3 > 0
    assert whole.frozen == 0
    assert (whole.head_trains, shared.head_trains) == (True, False)
    assert whole.head == shared.head == model.config.vocab_size * model.config.hidden_size
    found = step_flops(
        Matrices(frozen=1000, trained=10, head=1, head_trains=False), tokens=7, response_tokens=3, epochs=4
    )
    assert found == 2 * (1000 * 7 + 10 * 7 * (2 + 3 * 4) + 3 * (2 + 2 * 4))


def test_embeddings_are_no_products():
    """Neither those of words nor those of positions; GPT-2's layers are four matrices of 12 H^2 entries together."""
    model = tiny_model("gpt2")
    assert matrices_of(model)[:2] == (0, 2 * 12 * 16**2)


def test_the_last_new_token_is_never_read():
    matrices = Matrices(frozen=3, trained=2, head=100, head_trains=True)
    assert generation_flops(matrices, prompt_tokens=20, prompts=4, new_tokens=1) == 2 * (5 * 20 + 100 * 4)
    assert generation_flops(matrices, prompt_tokens=20, prompts=4, new_tokens=3) == 2 * (5 * (20 + 8) + 100 * 12)


# Where a step goes.


def test_a_stopwatch_books_every_moment_to_the_innermost_part():
    watch = Stopwatch(iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0]).__next__)
    watch.begin(HEAD)
    watch.begin(FORWARD)
    watch.end()
    watch.end()
    watch.begin(SCORING)
    watch.begin(HEAD)
    watch.stop()
    assert watch.seconds == dict.fromkeys(PARTS, 0.0) | {OTHER: 1 + 5, HEAD: 2 + 4, FORWARD: 3, SCORING: 6 + 7}


def test_every_part_of_a_step_is_seen_and_the_step_stays_as_it_is():
    """A seam that has moved would leave its part empty."""
    plain, timed = make_trainer(max_grad_norm=1.0), make_trainer(max_grad_norm=1.0)
    plain.step(*make_batch())
    with watched(timed) as watch:
        timed.step(*make_batch())
    assert all(seconds > 0 for seconds in watch.seconds.values()), watch.seconds
    for mine, theirs in zip(plain.model.parameters(), timed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    seen = dict(watch.seconds)
    timed.step(*make_batch())
    assert watch.seconds == seen, "a timer is left behind"


# Workers.


def test_a_worker_measures_a_step(directory, monkeypatch):
    monkeypatch.setitem(w.WORKS, "W1", TINY)
    monkeypatch.setattr(worker, "product_rates", lambda: {"mm": 100.0})
    found = measure(ours, "W1", directory, accel="eager", profile=True)
    assert set(found["seconds"]) == set(found["peak_mib"]) == {"step"}
    assert set(found["parts"]) == set(PARTS)
    assert set(found["statistics"]) == set(worker.STATISTICS)
    queries, responses, _ = w.make_batch(TINY, tiny_model("llama").config.vocab_size)
    assert found["response_tokens"] == sum(map(len, responses)) == found["tokens"] - sum(map(len, queries))
    assert found["needed_flops"] > 0
    assert ours.make_trainer(directory, TINY, accel="eager").config.ratio_threshold == w.RATIO_THRESHOLD
    assert table.summary([json.loads(json.dumps(found)) | {"work": "W1", "side": "ours"}])


def test_a_worker_measures_generation(directory, monkeypatch):
    monkeypatch.setitem(w.WORKS, "W4", TINY._replace(new_tokens=5))
    monkeypatch.setattr(worker, "product_rates", lambda: {"mm": 100.0})
    found = measure(ours, "W4", directory, accel="eager", profile=True)
    assert list(found["seconds"]) == ["generate", "generate, batch 4"]
    assert "parts" not in found


def test_the_peer_reads_the_workload_alone():
    """Its environment has nothing of this repository."""
    source = (Path(worker.__file__).parent / "peer.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "ppo_" in line or "tests" in line]
    assert [line.split()[1] for line in imports if line.startswith("from .")] == [".workload"]


def test_rows_are_the_same_for_whoever_asks():
    once, again = w.make_batch(w.WORKS["W2"], 1000), w.make_batch(w.WORKS["W2"], 1000)
    for mine, theirs in zip(once, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    lengths = [len(response) for response in once[1]]
    assert len(set(lengths)) > 1
    assert w.SHORTEST <= min(lengths) <= max(lengths) <= 128


# The table.


def run(side: str, seconds: float, mib: float, rate: float = 100.0, **more: Any) -> table.Run:
    return {
        "work": "W1",
        "side": side,
        "seconds": {"step": seconds},
        "peak_mib": {"step": mib},
        "product_gflops": {"mm": [rate - 10, rate + 10], "onednn": [2 * rate, 2 * rate]},
        **more,
    }


def test_medians_ratios_and_efficiency():
    runs = [run("ours", seconds, 300, needed_flops=4e11) for seconds in (8.0, 10.0, 50.0)]
    runs += [run("peer", seconds, 400) for seconds in (20.0, 16.0, 90.0)]
    (row,) = table.summary(runs)
    assert row.other is not None
    assert (row.ours.seconds, row.other.seconds) == (10.0, 20.0)
    assert (row.ours.of_mm, row.other.of_mm) == pytest.approx((0.4, 0.2))
    assert (row.ours.of_limit, row.other.of_limit) == pytest.approx((0.2, 0.1))
    shown = table.render(runs).splitlines()
    assert shown[2].split() == ["W1", "step", "10.00", "20.00", "2.00x", "300", "400", "0.75", "0.40", "0.20", "0.20"]


def test_efficiency_is_by_the_rate_of_the_same_run():
    """A machine that is half as fast for one run takes twice as long, and is used no worse."""
    runs = [run("ours", 10.0, 1, rate=100.0, needed_flops=4e11), run("ours", 20.0, 1, rate=50.0, needed_flops=4e11)]
    assert table.summary(runs)[0].ours.of_mm == pytest.approx(0.4)


def test_ours_alone_has_no_ratio_and_a_profile_has_a_line():
    runs = [run("ours", 10.0, 300, needed_flops=4e11, parts={"head": 1.5, "other": 2.25})]
    shown = table.render(runs).splitlines()
    assert shown[2].split() == ["W1", "step", "10.00", "-", "-", "300", "-", "-", "0.40", "-", "0.20"]
    assert shown[-1].split() == ["W1", "1.50", "2.25", "3.75"]
    assert table.summary([run("peer", 1.0, 1)]) == []


# The command.


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Workers that answer at once, and what they were asked, in order."""
    asked: list[tuple[Any, ...]] = []

    def answer(side: command.Side, threads: int, *arguments: object) -> dict[str, Any]:
        asked.append((side.module, side.accel, *arguments))
        found = run(side.module, 10.0, 300, needed_flops=4e11) | {"backend": side.accel, "load": [0.0, 1.0]}
        return {name: value for name, value in found.items() if name not in ("work", "side")}

    monkeypatch.setattr(command, "run_worker", answer)
    monkeypatch.setattr(command.os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    return asked


def test_the_sides_take_turns(workers, directory, tmp_path, capsys):
    file = tmp_path / "runs.json"
    told = ["--model", directory, "--peer", "python", "--runs", "2", "--only", "W1", "W3", "--json", str(file)]
    command.main(told)
    assert [(side, arguments[1]) for side, _, *arguments in workers] == [
        (side, work) for work in ("W1", "W3") for _ in range(2) for side in ("ours", "peer")
    ]
    assert [i for i, (*_, last) in enumerate(workers) if last == "--profile"] == [0, 4], "once for each workload"
    assert [(r["work"], r["side"], r["turn"]) for r in json.loads(file.read_text())[:3]] == [
        ("W1", "ours", 0),
        ("W1", "peer", 0),
        ("W1", "ours", 1),
    ]
    assert "1.00x" in capsys.readouterr().out


def test_ours_alone_and_ours_against_eager(workers, directory, capsys):
    command.main(["--model", directory, "--only", "W2", "--runs", "1"])
    command.main(["--model", directory, "--only", "W2", "--runs", "1", "--accel", "ipex", "--eager"])
    assert [asked[:2] for asked in workers] == [("ours", "auto"), ("ours", "ipex"), ("ours", "eager")]
    assert "eager MiB" in capsys.readouterr().out


def test_a_busy_machine_is_refused(workers, directory, monkeypatch, capsys):
    monkeypatch.setattr(command.os, "getloadavg", lambda: (1.3, 0.0, 0.0))
    with pytest.raises(SystemExit):
        command.main(["--model", directory])
    assert "the load is 1.30, above 0.5" in capsys.readouterr().err
    assert workers == []
    command.main(["--model", directory, "--busy", "--only", "W1", "--runs", "1"])
    assert "BUSY" in capsys.readouterr().out


# Same numbers.


def weights(before: torch.Tensor, after: torch.Tensor) -> sameness.Weights:
    return {"before": {"w": before}, "after": {"w": after}}


def test_distance_of_weights():
    start = torch.zeros(2)
    ours_, peer_ = weights(start, torch.tensor([3.0, 4.0])), weights(start, torch.tensor([3.0, 4.5]))
    assert sameness.distance(ours_, peer_) == sameness.Distance(
        apart=0.5, moved=4.0, relative=0.1, where="w", rounding=0.125
    )
    with pytest.raises(ValueError, match="w is not the same to begin with"):
        sameness.distance(ours_, weights(torch.ones(2), start))


def test_a_step_takes_the_rows_in_the_order_that_both_are_given(monkeypatch):
    import ppo_runtime.trainer

    planned: list[Any] = []
    plan_updates = ppo_runtime.trainer.plan_updates
    monkeypatch.setattr(ppo_runtime.trainer, "plan_updates", lambda *a: planned.append(plan_updates(*a)) or planned[-1])
    trainer = make_trainer(batch_size=4, mini_batch_size=2, ppo_epochs=w.EPOCHS)
    ours.step_in_order(trainer, TINY, make_batch(4), seed=5)
    (plan,) = planned
    taken = [torch.cat([torch.cat(update) for update in epoch]) for epoch in plan]
    assert all(torch.equal(a, b) for a, b in zip(taken, w.orders(TINY, 5), strict=True))


def test_both_sides_start_with_the_same_weights_away_from_the_reference():
    models = [make_trainer().model for _ in range(2)]
    torch.nn.init.ones_(models[0].v_head.summary.weight)
    before = models[0].pretrained_model.get_output_embeddings().weight.clone()
    for model in models:
        w.set_start(model)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert models[0].v_head.summary.weight.any()
    assert not torch.equal(models[0].pretrained_model.get_output_embeddings().weight, before)


def test_older_view_of_a_directory(directory, tmp_path):
    target = tmp_path / "older"
    target.mkdir()
    older.view(Path(directory), target)
    fields = json.loads((target / "config.json").read_text())
    assert "rope_parameters" not in fields
    assert fields["rope_theta"] == tiny_model("llama").config.rope_parameters["rope_theta"]
    assert fields["torch_dtype"] == "float32"
    assert (target / "model.safetensors").read_bytes() == (Path(directory) / "model.safetensors").read_bytes()
