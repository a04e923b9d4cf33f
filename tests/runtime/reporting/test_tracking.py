"""What was logged can be read back, whatever happened to the run in between."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runtime.reporting.jsonl import JsonlTracker, read_jsonl
from ppo_runtime.reporting.plotting import plot_curves
from ppo_runtime.reporting.statistics import scalars
from ppo_runtime.reporting.tracking import TensorBoardTracker, WandbTracker, make_trackers

ROWS = [{"query": "Für | Elise\n", "response": " da da", "reward": 0.5}, {"query": "b", "reward": math.nan}]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a package look uninstalled, whether it is or not."""

    class Finder:
        hidden = ""

        def find_spec(self, name: str, *_: object) -> None:
            if name == self.hidden:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    finder = Finder()

    def hide(name: str) -> None:
        finder.hidden = name
        for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)

    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    return hide


def test_lines_come_back(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "m.jsonl")
    tracker.log(1, {"ppo/loss/total": 0.1, "count": 3}, {})
    tracker.log(2, {"ppo/loss/total": np.float32(0.5)}, {"game_log": ROWS[:1]})
    # Before it is closed: every line is flushed.
    assert read_jsonl(tracker.path) == [
        {"step": 1, "ppo/loss/total": 0.1, "count": 3},
        {"step": 2, "ppo/loss/total": 0.5, "tables": {"game_log": ROWS[:1]}},
    ]
    tracker.close()


def test_nonfinite_numbers_are_null_and_named(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log(1, {"a": math.nan, "b": -math.inf, "c": np.float32("inf"), "d": 1.0}, {"log": ROWS})
    tracker.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(tracker.path.read_text(), parse_constant=refuse)
    assert [line[key] for key in "abcd"] == [None, None, None, 1.0]
    assert line["nonfinite"] == ["a", "b", "c", "log/reward"]


@pytest.mark.parametrize("torn", ['{"step": 2, "a": 0.', "{", '{"step": 2}'])
def test_a_torn_last_line_is_dropped_and_the_file_continued(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert read_jsonl(path) == [{"step": 1}]
    tracker = JsonlTracker(path)
    tracker.log(2, {}, {})
    tracker.close()
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_file_of_somebody_elses_without_a_line_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"mine": 1}')
    (tracker,) = make_trackers(None, tmp_path, {}, "ppo", {})
    tracker.close()
    assert (tmp_path / "metrics-1.jsonl").read_text() == '{"mine": 1}'


def test_numbers_of_any_kind_are_scalars() -> None:
    numbers = {"a": np.float32(1), "b": torch.tensor(2.0), "c": 3, "d": np.array(4), "e": np.bool_(1), "f": True}
    others = {"g": "5", "h": torch.ones(1), "i": np.array("6"), "j": torch.tensor(1j), "k": np.array([1.0]), "l": None}
    assert scalars(numbers | others) == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 1.0, "f": 1.0}


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2 is not JSON"):
        read_jsonl(path)


@pytest.mark.parametrize("key", ["step", "tables", "nonfinite"])
def test_the_files_own_keys_are_refused(tmp_path: Path, key: str) -> None:
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=f"scalars has the key '{key}'"):
        tracker.log(1, {key: 1.0}, {})
    tracker.close()
    assert read_jsonl(tracker.path) == []


def test_jsonl_is_always_written(tmp_path: Path) -> None:
    (tracker,) = make_trackers(None, tmp_path / "run", {}, "ppo", {})
    tracker.log(1, {"a": 1.0}, {})
    tracker.close()
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


def test_unknown_trackers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_with is 'mlflow', expected one of None, 'tensorboard', 'wandb'"):
        make_trackers("mlflow", tmp_path, {}, "ppo", {})


@pytest.mark.parametrize("kwargs", [{"filename_suffix": ".mine"}, {"tensorboard": {"filename_suffix": ".mine"}}])
def test_tensorboard_writes_curves_and_texts(tmp_path: Path, kwargs: dict) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for tracker in make_trackers("tensorboard", tmp_path, kwargs, "ppo", {}):
        tracker.log(1, {"ppo/loss/total": 0.5}, {"game_log": ROWS})
        tracker.log(2, {"ppo/loss/total": 0.25}, {})
        tracker.close()
    (events,) = tmp_path.glob("events.*.mine")
    read = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in read.Scalars("ppo/loss/total")] == [(1, 0.5), (2, 0.25)]
    (text,) = read.Tensors("game_log/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines() == [
        "| query | response | reward |",
        "| --- | --- | --- |",
        r"| Für \| Elise<br> |  da da | 0.5 |",
        "| b |  | nan |",
    ]


def test_missing_tensorboard_names_the_extra(tmp_path: Path, missing: Any) -> None:
    missing("tensorboard")
    with pytest.raises(ImportError, match=r"log_with='tensorboard' needs .* pip install 'ppo-core\[tensorboard\]'"):
        TensorBoardTracker(tmp_path)


def test_missing_wandb_names_the_extra_and_leaves_no_file(tmp_path: Path, missing: Any) -> None:
    missing("wandb")
    with pytest.raises(ImportError, match=r"log_with='wandb' needs .* pip install 'ppo-core\[wandb\]'"):
        make_trackers("wandb", tmp_path, {}, "ppo", {})
    assert not list(tmp_path.iterdir())


class FakeWandb:
    """As much of wandb as we touch; it keeps what it is given."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def init(self, **settings: Any) -> "FakeWandb":
        self.settings = settings
        return self

    def log(self, line: dict[str, Any], step: int) -> None:
        self.logged.append((step, line))

    def finish(self) -> None:
        self.finished = True

    def Table(self, columns: list[str], data: list[list[object]]) -> tuple[list[str], list[list[object]]]:
        return columns, data


def test_wandb_gets_settings_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = WandbTracker("austen", tmp_path / "w", {"seed": 1}, entity="me")
    tracker.log(4, {"a": 1.0}, {"log": [{"query": "a"}, {"reward": 2.0}]})
    tracker.close()
    # No "mode" is set: WANDB_MODE=offline decides.
    assert fake.settings == {"project": "austen", "dir": str(tmp_path / "w"), "config": {"seed": 1}, "entity": "me"}
    assert fake.logged == [(4, {"a": 1.0, "log": (["query", "reward"], [["a", ""], ["", 2.0]])})]
    assert fake.finished


def curve(steps: int) -> list[dict[str, Any]]:
    keys = ("ppo/mean_scores", "objective/kl", "objective/kl_coef", "ppo/loss/policy", "ppo/loss/value")
    return [{"step": step, **dict.fromkeys((*keys, "ppo/loss/total"), 0.1 * step)} for step in range(steps)]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
class TestPlotCurves:
    @pytest.mark.parametrize(("steps", "kl_target"), [(1, 6.0), (60, None)])
    def test_writes_a_png(self, tmp_path: Path, steps: int, kl_target: float | None) -> None:
        metrics = curve(steps)
        metrics[-1]["objective/kl"] = None  # as a nonfinite value comes back
        path = tmp_path / "new" / "curves.png"
        plot_curves(metrics, path, "A title", kl_target=kl_target)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000

    @pytest.mark.parametrize("values", [{}, {"objective/kl_coef": None, "objective/kl": None}])
    def test_curves_without_numbers_are_empty(self, tmp_path: Path, values: dict) -> None:
        plot_curves([{"step": 1, "ppo/mean_scores": 0.1, **values}], tmp_path / "a.png", "t")
        assert (tmp_path / "a.png").exists()

    def test_a_step_run_twice_counts_once(self, tmp_path: Path) -> None:
        again = [{**line, "ppo/mean_scores": 9.0} for line in curve(6)[3:]]
        plot_curves(curve(6) + again, tmp_path / "twice.png", "t")
        plot_curves(curve(3) + again, tmp_path / "once.png", "t")
        assert (tmp_path / "twice.png").read_bytes() == (tmp_path / "once.png").read_bytes()

    def test_settings_of_matplotlib_stay(self, tmp_path: Path) -> None:
        from matplotlib import rcParams

        # Merely reading the backend resolves it, so it is left out.
        before = {key: rcParams[key] for key in rcParams if key != "backend"}
        plot_curves(curve(2), tmp_path / "a.png", "t")
        assert {key: rcParams[key] for key in before} == before

    def test_nothing_to_draw_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no line with 'ppo/mean_scores', expected at least one"):
            plot_curves([{"step": 1}], tmp_path / "a.png", "t")


def test_missing_matplotlib_names_the_extra(tmp_path: Path, missing: Any) -> None:
    missing("matplotlib")
    with pytest.raises(ImportError, match=r"plot_curves needs .* pip install 'ppo-core\[plot\]'"):
        plot_curves(curve(2), tmp_path / "a.png", "t")
