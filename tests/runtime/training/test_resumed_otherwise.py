"""A run that is resumed with other models, data, functions or ways to generate: refused, or said, by what differs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from ppo_core.advantages import Advantages
from ppo_core.returns import reward_to_go
from ppo_runtime import PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.learning.update import clipped_objective
from ppo_runtime.loop import train
from ppo_runtime.resuming import files
from ppo_runtime.rollout.engine import generate_responses
from tests.runtime.support.sealing import change
from tests.runtime.support.tiny import tiny_lora, tiny_model
from tests.runtime.support.trainers import make_trainer


def configured(**fields: Any) -> Callable[[Any], Any]:
    """A model whose configuration says something else, as one that was made of it would."""

    def placed(model: Any) -> Any:
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model

    return placed


def lora(**fields: Any) -> dict[str, Any]:
    return {"peft_config": tiny_lora("llama", **fields)}


def refused(then: dict[str, Any], now: dict[str, Any], folder: Path) -> str:
    """What is said of a checkpoint of one trainer that another one, made otherwise, loads; empty if it is taken."""
    save_checkpoint(make_trainer(**then), folder / "checkpoint")
    trainer = make_trainer(**now)
    try:
        load_checkpoint(trainer, folder / "checkpoint")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (lora(lora_alpha=4), lora(lora_alpha=64), "lora_alpha of adapter 'default' of the policy is 64, and was 4;"),
        (lora(), lora(use_rslora=True), "use_rslora of adapter 'default' of the policy is True, and was False"),
        (lora(), lora(lora_dropout=0.5), "lora_dropout of adapter 'default' of the policy is 0.5, and was 0.0"),
        (
            lora(),
            lora(alpha_pattern={"q_proj": 400}),
            "alpha_pattern of adapter 'default' of the policy is {'q_proj': 4",
        ),
        (
            lora(alpha_pattern={"q_proj": 4}),
            lora(),
            "alpha_pattern of adapter 'default' of the policy is {}, and was {",
        ),
        ({}, {"dropout": 0.5}, "attention_dropout of the configuration of the policy is 0.5, and was 0.0"),
        ({}, {"placed": configured(rms_norm_eps=1.0)}, "rms_norm_eps of the configuration of the policy is 1.0"),
        (
            {},
            {"placed": configured(rope_parameters={"rope_type": "default", "rope_theta": 1.0})},
            "rope_parameters of the configuration of the policy is {",
        ),
        (
            {"ref_model": tiny_model("llama")},
            {"ref_model": tiny_model("llama", rms_norm_eps=1.0)},
            "rms_norm_eps of the configuration of the reference is 1.0, and was 1e-06",
        ),
    ],
    ids=[
        "alpha",
        "scaling",
        "adapter's dropout",
        "a pattern",
        "no pattern",
        "dropout",
        "epsilon",
        "rotation",
        "reference",
    ],
)
def test_models_that_compute_something_else_are_refused(
    then: dict[str, Any], now: dict[str, Any], said: str, tmp_path: Path
) -> None:
    found = refused(then, now, tmp_path)
    assert "was made with models that compute something else: " in found
    assert said in found
    assert "make them as they were made then" in found


@pytest.mark.parametrize(
    "fields",
    [
        {"_name_or_path": "elsewhere", "transformers_version": "9.9"},
        {"use_cache": False, "architectures": ["Other"], "initializer_range": 0.5, "id2label": {0: "a"}},
        {"_attn_implementation": "eager"},
        {"a_field_of_a_later_version": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "more": None}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_where_a_model_is_from_and_how_it_is_run_may_change(fields: dict[str, Any], tmp_path: Path) -> None:
    assert refused({}, {"placed": configured(**fields)}, tmp_path) == ""


def test_checkpoints_that_know_nothing_of_it_are_taken(tmp_path: Path) -> None:
    save_checkpoint(make_trainer(dataset=rows()), tmp_path / "checkpoint")
    change(
        tmp_path / "checkpoint",
        files.STATE,
        lambda held: [held.pop(name) for name in ("computes", "made_with")] and held,
    )
    load_checkpoint(make_trainer(dropout=0.5, dataset=rows()), tmp_path / "checkpoint")


# --- data --------------------------------------------------------------------------------------------------------


def rows(changed: int | None = None) -> Dataset:
    """Of 200 prompts, one of them another one."""
    return Dataset.from_dict({"input_ids": [[5 + row % 50] * (1 + (row == changed)) for row in range(200)]})


def of_before(path: Path) -> None:
    """As a version has written it that looked at 64 prompts."""

    def without(held: Any) -> None:
        held["dict"] = [pair for pair in held["dict"] if pair[0] != "all_prompts"]

    change(path, files.rank_file(0), without)


# One in four was looked at, the first among them.
@pytest.mark.parametrize(
    ("changed", "old", "seen"), [(4, False, True), (5, False, True), (4, True, True), (5, True, False)]
)
def test_any_other_prompt_is_seen(changed: int, old: bool, seen: bool, tmp_path: Path) -> None:
    path = save_checkpoint(make_trainer(dataset=rows()), tmp_path / "checkpoint")
    if old:
        of_before(path)
    load_checkpoint(make_trainer(dataset=rows()), path)
    trainer = make_trainer(dataset=rows(changed))
    if not seen:
        load_checkpoint(trainer, path)
        return
    with pytest.raises(ValueError, match="was made with a dataset of other prompts; pass the dataset of then"):
        load_checkpoint(trainer, path)


# --- functions and generation ------------------------------------------------------------------------------------


def without_critic(rewards: Any, values: Any, mask: Any, *, config: Any) -> Advantages:
    found = reward_to_go(rewards, mask, gamma=config.gamma)
    return Advantages(found, found)


def doubled(*args: Any, **options: Any) -> Any:
    return clipped_objective(*args, **options)


def another_engine(*args: Any, **options: Any) -> Any:
    return generate_responses(*args, **options)


def run(trainer: PPOTrainer, home: Path, steps: int, *, resume: bool, **generation: Any) -> None:
    train(
        trainer,
        lambda _, texts: [float(len(text)) for text in texts],
        steps=steps,
        generation_kwargs=generation,
        output_dir=home,
        resume=resume,
        console=Console(file=io.StringIO()),
    )


def test_what_a_run_is_made_with_is_named_where_it_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"dataset": rows(), "project_kwargs": {"logging_dir": str(tmp_path)}}
    run(make_trainer(**settings), tmp_path, 1, resume=False, max_new_tokens=4, top_k=5)
    run(make_trainer(**settings), tmp_path, 2, resume=True, max_new_tokens=4, top_k=5)
    assert "other settings" not in caplog.text
    trainer = make_trainer(**settings)
    trainer.advantage_estimator, trainer.policy_objective = without_critic, doubled
    trainer.response_engine, trainer.eos_token_ids = another_engine, frozenset({1, 20})
    run(trainer, tmp_path, 3, resume=True, max_new_tokens=5, temperature=0.5)
    said = caplog.text
    assert "the run goes on with other settings than the checkpoint's" in said
    assert "advantages was gae_estimator and is without_critic" in said
    assert "policy_loss was clipped_objective and is doubled" in said
    assert "engine was generate_responses and is another_engine" in said
    assert "eos_token_ids was [1] and is [1, 20]" in said
    assert "max_new_tokens of generation_kwargs was 4 and is 5" in said
    assert "top_k of generation_kwargs was 5 and is" in said
    assert "temperature of generation_kwargs was " in said
