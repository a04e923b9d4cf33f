"""Trainers of the user's own: classes above ours, and attributes that are assigned."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.loop import train
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer, untimed


def _made(kind: type[PPOTrainer], **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 6})
    return kind(PPOConfig(**(SETTINGS | settings)), model, None, tiny_tokenizer(), dataset)


def _train(trainer: PPOTrainer, steps: int) -> None:
    train(trainer, lambda _, responses: [0.0] * len(responses), steps=steps, console=Console(file=io.StringIO()))


def test_a_class_may_have_trackers_of_its_own() -> None:
    class Kept:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, step: int, *_: Any) -> None:
            self.steps.append(step)

    class Own(PPOTrainer):
        kept = Kept()

        @property
        def trackers(self) -> list[Any]:
            return [self.kept]

    trainer = _made(Own)
    queries, responses, scores = make_batch()
    trainer.log_stats(trainer.step(queries, responses, scores), {}, scores)
    _train(trainer, 2)
    assert Own.kept.steps == [1, 2]


def test_a_class_may_use_names_that_are_no_attributes_of_ours() -> None:
    """Words that a class of one's own is likely to have; what a trainer is given by these names, it keeps by others."""

    class Own(PPOTrainer):
        @property
        def log(self) -> str:
            return "log"

        def advantages(self) -> str:
            return "advantages"

        def policy_loss(self) -> str:
            return "loss"

        @property
        def keeper(self) -> str:
            return "keeper"

        @property
        def engine(self) -> str:
            return "engine"

    expected, found = _made(PPOTrainer), _made(Own)
    for trainer in (expected, found):
        torch.manual_seed(0)
        trainer.generate(torch.tensor([5, 6]), max_new_tokens=2, do_sample=True, top_k=0)
    np.testing.assert_equal(*(untimed(trainer.step(*make_batch())) for trainer in (expected, found)))
    assert [found.log, found.advantages(), found.policy_loss(), found.keeper, found.engine] == [
        "log",
        "advantages",
        "loss",
        "keeper",
        "engine",
    ]


# --- what is assigned is in force -------------------------------------------------------------------------------------

QUERIES = [torch.arange(3, 8), torch.tensor([9]), torch.tensor([4, 4])] * 2
SAMPLING: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "top_k": 0}


def _ending_with(ends: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = ends
    return tokenizer


def _without_own_end(tokenizer: Any) -> Any:
    """A trainer whose model says nothing of where a response ends, so that the tokenizer's token does it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    model.pretrained_model.generation_config.eos_token_id = None
    return PPOTrainer(PPOConfig(**SETTINGS), model, None, tokenizer)


def _behaviour(trainer: Any) -> dict[str, Any]:
    """What it generates, logs and makes of two steps."""
    torch.manual_seed(1)
    logged: list[Any] = []
    trainer.run_log._trackers = [SimpleNamespace(log=lambda *entry: logged.append(entry))]
    responses, of_reference = trainer.generate(QUERIES, return_prompt=False, generate_ref_response=True, **SAMPLING)
    scores = [float(len(query)) for query in QUERIES]
    stats = [untimed(trainer.step(QUERIES, responses, scores)) for _ in range(2)]
    trainer.log_stats({}, {"response": responses}, scores)
    rows = [[row.tolist() for row in rows] for rows in (responses, of_reference)]
    return {"rows": rows, "stats": stats, "logged": logged}


def _assert_as_made(assigned: Any, made: Any, former: Any) -> None:
    """The same as a trainer made that way, and not what it was, so that the check can fail."""
    expected, found, otherwise = (_behaviour(trainer) for trainer in (made, assigned, former))
    np.testing.assert_equal(found, expected)
    with pytest.raises(AssertionError):
        np.testing.assert_equal(otherwise, expected)


@pytest.mark.parametrize(
    "change",
    [{"kl_penalty": "abs"}, {"use_score_scaling": True}, {"score_clip": 2.0}, {"cliprange": 1e-4}, {"gamma": 0.5}],
    ids=str,
)
def test_settings_that_are_assigned_are_in_force(change: dict[str, Any]) -> None:
    trainer = make_trainer()
    trainer.config = attrs.evolve(trainer.config, **change)
    _assert_as_made(trainer, make_trainer(**change), make_trainer())


def test_static_padding_that_is_assigned_is_in_force() -> None:
    trainer = make_trainer()
    trainer.config = attrs.evolve(trainer.config, pad_for_acceleration=True, pad_max_len=64, pad_max_input_len=3)
    with pytest.raises(ValueError, match="pad_max_input_len is 3"):
        trainer.generate(QUERIES, **SAMPLING)
    trainer = make_trainer("t5")
    with pytest.raises(ValueError, match="pad_max_input_len is 0"):
        trainer.config = attrs.evolve(trainer.config, pad_for_acceleration=True, pad_max_len=64)


def test_uploads_that_are_asked_for_later_are_made() -> None:
    trainer, uploaded = make_trainer(), []
    trainer.push_to_hub = lambda **kwargs: uploaded.append(kwargs)
    trainer.config = attrs.evolve(trainer.config, push_to_hub_if_best_kwargs={"repo_id": "a/b"})
    trainer.step(*make_batch())
    assert uploaded == [{"repo_id": "a/b"}]


def test_settings_that_are_assigned_know_the_model() -> None:
    trainer = make_trainer("t5")
    trainer.config = PPOConfig(**SETTINGS)
    assert trainer.is_encoder_decoder
    with pytest.raises(TypeError, match="config is a dict, expected a PPOConfig"):
        trainer.config = {}
    assert trainer.config.batch_size == 6


@pytest.mark.parametrize(
    ("change", "instead"),
    [
        ({"learning_rate": 1e-2}, r"learning_rate was read when the trainer was made, .* 0.01 .*: set 'lr' in each of"),
        ({"init_kl_coef": 1.0, "vf_coef": 1.0}, r"init_kl_coef was read when .*: set trainer.kl_ctl.value"),
    ],
)
def test_settings_that_are_read_once_are_refused(change: dict[str, Any], instead: str) -> None:
    trainer = make_trainer()
    before = trainer.config
    with pytest.raises(ValueError, match=instead):
        trainer.config = attrs.evolve(trainer.config, **change)
    assert trainer.config is before


def test_a_tokenizer_that_is_assigned_ends_pads_and_reads() -> None:
    trainer, made = _without_own_end(tiny_tokenizer()), _without_own_end(_ending_with("e"))
    trainer.tokenizer = _ending_with("e")
    assert (trainer.pad_token_id, trainer.eos_token_ids) == (made.pad_token_id, made.eos_token_ids)
    _assert_as_made(trainer, made, _without_own_end(tiny_tokenizer()))
    with pytest.raises(TypeError, match="tokenizer is None"):
        trainer.tokenizer = None


def test_special_tokens_that_are_assigned_are_in_force() -> None:
    plans: list[Any] = []

    def engine(model: Any, queries: Any, settings: Any, plan: Any, *_: Any) -> Any:
        plans.append(plan)
        return queries

    trainer = _without_own_end(tiny_tokenizer())
    trainer.response_engine = engine
    trainer.pad_token_id, trainer.eos_token_ids = 5, {7, 8}
    trainer.generate(QUERIES, **SAMPLING)
    assert [(plan.pad_token_id, plan.eos_token_ids) for plan in plans] == [(5, [7, 8])]


def test_a_reference_that_is_assigned_is_in_force() -> None:
    other = tiny_model("llama", seed=1)
    trainer = make_trainer()
    trainer.ref_model = other
    _assert_as_made(trainer, make_trainer(ref_model=tiny_model("llama", seed=1)), make_trainer())
    assert not any(parameter.requires_grad for parameter in other.parameters())
    with pytest.raises(TypeError, match="ref_model is a Linear"):
        trainer.ref_model = torch.nn.Linear(2, 2)
    assert trainer.ref_model is other


def test_another_model_is_refused() -> None:
    trainer = make_trainer()
    trainer.model = trainer.model.train()
    with pytest.raises(ValueError, match="model is another one than the trainer was made with"):
        trainer.model = make_trainer().model


def _of_another_model(_: Any) -> Any:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


@pytest.mark.parametrize(
    ("name", "part", "error", "message"),
    [
        ("optimizer", _of_another_model, ValueError, "optimizer holds none of the .* parameters of model that train"),
        ("optimizer", lambda _: None, TypeError, "optimizer is .*, expected a torch.optim.Optimizer"),
        ("kl_ctl", lambda _: 0.2, TypeError, "kl_ctl is a float without value and update, expected a controller"),
        ("kl_ctl", lambda _: SimpleNamespace(value=0.2), TypeError, "kl_ctl is a SimpleNamespace without update,"),
    ],
)
def test_a_part_that_cannot_train_is_not_taken(name: str, part: Any, error: Any, message: str) -> None:
    trainer = make_trainer()
    before = getattr(trainer, name)
    with pytest.raises(error, match=message):
        setattr(trainer, name, part(trainer))
    assert getattr(trainer, name) is before


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("compute_rewards", "give step other scores"),
        ("compute_advantages", "set advantage_est"),
        ("loss", "set policy_"),
    ],
)
def test_a_method_that_a_step_does_not_call_is_pointed_out(name: str, instead: str) -> None:
    def own(*_: Any) -> None: ...

    with pytest.warns(UserWarning, match=f"Own.{name} is not called by step; {instead}.*, or override step") as seen:
        type("Own", (PPOTrainer,), {name: own})
    assert seen[0].filename == __file__
    type("Below", (type("Own", (PPOTrainer,), {"step": own}),), {name: own})
