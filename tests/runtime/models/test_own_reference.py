"""A PEFT policy as its own reference: refused where it would move, pointed out where it is not the model of before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from ppo_runtime import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    set_seed,
)
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch

pytestmark = [
    # peft warns of what is refused here.
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False:UserWarning"),
]
PROJECTIONS = ["q_proj", "v_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS, use_dora=True),
    "gaussian": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS, init_lora_weights="gaussian"),
    "embeddings": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"]),
    "a copy of the head": peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS, modules_to_save=["lm_head"]
    ),
    "a copy of a norm": peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS, modules_to_save=["norm"]
    ),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=PROJECTIONS, feedforward_modules=[]),
    "adalora": peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, total_step=10),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS),
}


def trainer_of(model: Any, ref_model: Any = None) -> PPOTrainer:
    fields: dict[str, Any] = SETTINGS | {"learning_rate": 1e-2}
    return PPOTrainer(PPOConfig(**fields), model, ref_model, tiny_tokenizer())


def adapted(config: Any, family: str = "llama") -> Any:
    set_seed(0)
    parent = AutoModelForSeq2SeqLMWithValueHead if family in ("t5", "bart") else AutoModelForCausalLMWithValueHead
    return parent.from_pretrained(tiny_model(family), peft_config=config)


def assert_reference_stays(trainer: PPOTrainer) -> None:
    batch = make_batch()
    history = [trainer.step(*batch) for _ in range(3)]
    assert (history[2]["objective/logprobs"] != history[0]["objective/logprobs"]).any()
    for stats in history:
        assert (stats["objective/ref_logprobs"] == history[0]["objective/ref_logprobs"]).all()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind_leave_the_reference_as_it_is(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of theirs is in force when they are off; fresh, they change nothing, and nothing is said."""
    model = adapted(ADAPTERS[kind])
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: part.training for name, part in model.named_modules()}
    with caplog.at_level(logging.INFO, "ppo_runtime.models.own_reference"):
        trainer = trainer_of(model)
    assert not [record for record in caplog.records if record.name == "ppo_runtime.models.own_reference"]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_reference_stays(trainer)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bart"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_in_the_base_are_refused_and_a_reference_of_its_own_stays(family: str, bias: str) -> None:
    with pytest.raises(ValueError, match=r"ref_model is None.*bias'.*create_reference_model\(model\).*bias='none'"):
        trainer_of(adapted(tiny_lora(family, bias=bias), family))
    model = adapted(tiny_lora(family, bias=bias), family)
    assert_reference_stays(trainer_of(model, create_reference_model(model)))


def test_a_part_of_the_base_that_was_unfrozen_by_hand_is_refused() -> None:
    model = adapted(tiny_lora("llama"))
    norm: nn.Module = model.pretrained_model.get_base_model().model.norm
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 of the parameters.*'pretrained_model.*\.norm\.weight'"):
        trainer_of(model)


@pytest.mark.parametrize("beginning", ["pissa", "olora", False])
def test_a_beginning_that_differs_from_the_loaded_model_is_pointed_out(
    beginning: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS, init_lora_weights=beginning)
    trainer_of(adapted(config))
    [record] = [record for record in caplog.records if record.name == "ppo_runtime.models.own_reference"]
    assert record.levelno == logging.WARNING
    assert f"init_lora_weights={beginning!r}" in record.getMessage()
    assert "pass the original model as ref_model" in record.getMessage()
    caplog.clear()
    trainer_of(adapted(config), tiny_model("llama"))
    assert not [record for record in caplog.records if record.name == "ppo_runtime.models.own_reference"]


def test_a_trained_adapter_goes_on_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=tiny_lora("llama"))
    trainer = trainer_of(model)
    trainer.step(*make_batch())
    trainer.save_pretrained(tmp_path / "adapter")
    with caplog.at_level(logging.INFO, "ppo_runtime.models.own_reference"):
        loaded = trainer_of(AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter"))
    [record] = [record for record in caplog.records if record.name == "ppo_runtime.models.own_reference"]
    assert record.levelno == logging.INFO
    assert "trained already" in record.getMessage()
    stats = loaded.step(*make_batch())
    assert not torch.equal(
        torch.as_tensor(stats["objective/logprobs"]), torch.as_tensor(stats["objective/ref_logprobs"])
    )
