"""Everything TRL's document names is there, with its parameters in their order; see ``api_table``."""

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

import ppo_runtime
from ppo_runtime import PPOConfig
from ppo_runtime.reporting.metrics import METRICS
from tests.runtime import api_table
from tests.runtime.support.trainers import make_batch, make_trainer


@pytest.mark.parametrize("name", [*api_table.TRAINER_API, *api_table.BESIDE, "PPOConfig"])
def test_name_and_parameters_are_the_reference_ones(name: str) -> None:
    verdicts = {parameter: verdict for row, parameter, verdict in api_table.rows() if row == name}
    assert verdicts, name
    assert all(verdict == "same" or verdict.startswith("differs: ") for verdict in verdicts.values()), verdicts


def test_differences_are_few_and_present() -> None:
    """No excuse outlives what it excused."""
    different = {(name, parameter) for name, parameter, verdict in api_table.rows() if verdict != "same"}
    assert different == set(api_table.DIFFERENT_DEFAULTS)


def test_what_is_exported_is_what_is_documented() -> None:
    named = {name.split(".")[0] for name in (*api_table.TRAINER_API, *api_table.BESIDE)}
    assert named | {"PPOConfig", "Trainer"} == set(ppo_runtime.__all__)


def test_only_known_fields_were_added_to_the_configuration() -> None:
    assert set(attrs.fields_dict(PPOConfig)) - set(api_table.CONFIG) == {
        "accel",
        "accel_strict",
        "device",
        "drop_last",
        "on_nonfinite",
        "parallelism",
        "ranks_timeout",
    }


def test_a_trainer_has_the_attributes_that_users_touch() -> None:
    trainer = make_trainer()
    for name in api_table.ATTRIBUTES:
        assert hasattr(trainer, name), name
    assert trainer.kl_ctl.value == trainer.config.init_kl_coef
    assert trainer.config.is_encoder_decoder is False
    assert trainer.config.is_peft_model is False


def test_a_step_reports_every_documented_statistic(tmp_path: Path) -> None:
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    stats = trainer.step(*make_batch())
    assert set(api_table.STATISTICS) <= set(stats)
    assert set(stats) == set(METRICS)
    assert all(isinstance(key, str) and not isinstance(value, dict) for key, value in stats.items()), "a flat dict"


@pytest.mark.parametrize("given", [{}, {"env/reward_mean": 7.0}, {"env/reward_mean": np.float32(7.0)}], ids=str)
def test_log_stats_adds_the_environment(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppo_runtime.reporting.jsonl import read_jsonl

    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    stats: dict[str, Any] = trainer.step(*make_batch()) | given
    trainer.log_stats(stats, {"query": ["a"] * 6, "response": ["b"] * 6}, make_batch()[2])
    trainer.close()
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    scores = np.array(make_batch()[2])
    assert line["env/reward_mean"] == pytest.approx(scores.mean(), abs=1e-6)
    assert line["env/reward_std"] == pytest.approx(scores.std(ddof=1), abs=1e-6)
    assert line["tables"]["game_log"][0].keys() == {"query", "response", "reward"}


def test_the_migration_page_is_true() -> None:
    """Its imports work and are all there are; every defect has its line and its test."""
    import re

    import tests.runtime.test_defects as defects

    page = (Path(ppo_runtime.__file__).parent / "compat" / "README.md").read_text()
    (imports,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(imports, "README.md", "exec"), names)
    assert set(names) - {"__builtins__"} == set(ppo_runtime.__all__) - {"Trainer"}
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert numbers == list(range(1, 23))
    tested = {int(name.split("_")[2]) for name in vars(defects) if name.startswith("test_defect_")}
    assert tested == set(numbers)
    for path in re.findall(r"\]\(([^)]+)\)", page):
        assert (Path(ppo_runtime.__file__).parent / "compat" / path).exists(), path


def test_a_document_is_walked_as_it_is_written() -> None:
    text = """
.. py:function:: mean(accelerator, xs: torch.Tensor, mask=None) -> Tuple[float, int]

.. py:class:: Trainer(config: a.b.Config = None, data: Optional[Union[int, str]] = None)

   .. py:method:: step(queries: List[torch.Tensor], columns: List[str] = ['a', 'b'], **options) -> None
"""
    required = api_table.REQUIRED
    assert api_table.walk_document(text) == {
        "mean": (("accelerator", required), ("xs", required), ("mask", None)),
        "Trainer": (("config", None), ("data", None)),
        "Trainer.step": (("queries", required), ("columns", ["a", "b"]), ("**options", required)),
    }


def test_the_table_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the check: a renamed parameter, another default and a lost name are all seen."""
    monkeypatch.setitem(api_table.TRAINER_API, "set_seed", (("number", api_table.REQUIRED),))
    monkeypatch.setitem(api_table.TRAINER_API, "whiten", (("values", api_table.REQUIRED), ("shift_mean", False)))
    monkeypatch.setitem(api_table.TRAINER_API, "PPOTrainer.evaluate", ())
    monkeypatch.delitem(api_table.BESIDE, "set_seed")
    monkeypatch.delitem(api_table.BESIDE, "whiten")
    verdicts = {(name, parameter): verdict for name, parameter, verdict in api_table.rows()}
    assert verdicts["set_seed", "seed"] == "OTHER PARAMETERS"
    assert verdicts["whiten", "shift_mean"] == "OTHER DEFAULT: True for False"
    assert verdicts["PPOTrainer.evaluate", ""] == "MISSING"
