"""Gradient checkpointing is in force in the trainer's own passes, however and whenever it was switched on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from ppo_runtime import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.learning import forward
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.modes import without_dropout
from tests.runtime.support.tiny import FAMILIES, TOKENS, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch


def enable(model: Any) -> None:
    """transformers' own switch, by its newer name where it has it."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


# Each is given the transformers model and its wrapper, whichever is there yet.
DOORS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "the wrapper's method": ("wrapped", lambda model: model.gradient_checkpointing_enable()),
    "the model's, once wrapped": ("wrapped", lambda model: enable(transformers_model(model))),
    "the model's, before": ("plain", enable),
    "with re-entrance": ("wrapped", lambda model: model.gradient_checkpointing_enable({"use_reentrant": True})),
}


@pytest.fixture(autouse=True)
def every_pass_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a layer are counted here, and a look for frozen ones runs it too."""
    monkeypatch.setattr(forward, "frozen_depth", lambda model: 0)


def trainer_of(family: str, *, door: str | None, lora: bool, training: bool) -> PPOTrainer:
    torch.manual_seed(0)
    moment, switch = ("never", enable) if door is None else DOORS[door]
    plain = tiny_model(family, dropout=0.3)
    if moment == "plain":
        switch(plain)
    parent = AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead
    adapter = {"peft_config": tiny_lora(family, lora_dropout=0.3)} if lora else {}
    model = parent.from_pretrained(plain, **adapter).train(training)
    if moment == "wrapped":
        switch(model)
    fields: dict[str, Any] = SETTINGS | {"ppo_epochs": 1}
    # Not Adam: the gradient of a key's bias is 0 but for rounding (softmax ignores a shift), and Adam makes whole
    # steps of it.
    plainest = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return PPOTrainer(PPOConfig(**fields), model, None, tiny_tokenizer(), optimizer=plainest)


def runs_of_a_layer(trainer: PPOTrainer) -> list[bool]:
    """Every run of a norm inside the policy's second layer, and so inside its checkpoint: whether with gradient."""
    runs: list[bool] = []
    layer = next(p for name, p in trainer.model.named_modules() if name.endswith((".h.1", "layers.1", "block.1")))
    norm = next(part for name, part in layer.named_modules() if name.endswith("norm") or "ln_1" in name)
    norm.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    return runs


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in model.named_modules()}


def trained(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [False, True], ids=["as loaded", "train()"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_again_in_a_step_and_the_step_is_the_same(family: str, lora: bool, training: bool) -> None:
    plain = trainer_of(family, door=None, lora=lora, training=training)
    once = runs_of_a_layer(plain)
    expected = plain.step(*make_batch())
    assert 0 < sum(once) < len(once)
    for door in DOORS:
        trainer = trainer_of(family, door=door, lora=lora, training=training)
        before, runs = flags(trainer.model), runs_of_a_layer(trainer)
        stats = trainer.step(*make_batch())
        assert len(runs) == len(once) + sum(once), f"{door}: again in each backward pass, and only there"
        assert flags(trainer.model) == before, door
        assert stats["ppo/loss/total"] == pytest.approx(expected["ppo/loss/total"], rel=1e-5), door
        for name, value in trained(plain).items():
            torch.testing.assert_close(trained(trainer)[name], value, rtol=1e-4, atol=1e-5, msg=f"{door}: {name}")


@pytest.mark.parametrize("training", [False, True], ids=["as loaded", "train()"])
def test_layers_run_again_in_the_piecewise_methods(training: bool) -> None:
    found: dict[str | None, int] = {}
    for door in (None, "the wrapper's method"):
        trainer = trainer_of("llama", door=door, lora=False, training=training)
        queries, responses, _ = make_batch(2)
        inputs = trainer.prepare_model_inputs(queries, responses)
        runs = runs_of_a_layer(trainer)
        logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        assert values is not None
        ones = torch.ones_like(logprobs)
        trainer.train_minibatch(logprobs.detach(), values.detach(), logprobs, None, values, mask, ones, ones)
        found[door] = len(runs)
    assert found["the wrapper's method"] == 2 * found[None]


def falcon(**options: bool) -> Any:
    """Reads its residual dropout from the configuration in every pass."""
    dropout = {"hidden_dropout": 0.4, "attention_dropout": 0.4}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**(TOKENS | shape | dropout | options)))


def gpt_neo(**options: Any) -> Any:
    """Reads its attention dropout from the configuration for flash attention alone."""
    dropout = dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout"), 0.4)
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    return GPTNeoForCausalLM(GPTNeoConfig(**(TOKENS | shape | dropout), max_position_embeddings=64, **options))


MAKERS: dict[str, Callable[[], Any]] = {
    "falcon": falcon,
    "falcon, alibi": lambda: falcon(alibi=True),
    "falcon, parallel": lambda: falcon(new_decoder_architecture=True),
    "falcon, in sequence": lambda: falcon(parallel_attn=False),
    "gpt_neo": gpt_neo,
}


@pytest.mark.parametrize("mode", ["as loaded", "train()", "checkpointing", "both"])
@pytest.mark.parametrize("kind", MAKERS)
def test_dropout_kept_in_a_configuration_is_off_in_updates(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    plain = MAKERS[kind]().eval()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain).train(mode in ("train()", "both"))
    if mode in ("checkpointing", "both"):
        model.gradient_checkpointing_enable()
    reference = type(plain)(plain.config).eval()
    before = dict(vars(plain.config))
    fields: dict[str, Any] = SETTINGS | {"ppo_epochs": 1}
    trainer = PPOTrainer(PPOConfig(**fields), model, reference, tiny_tokenizer())
    assert reference.config is plain.config
    stats = trainer.step(*make_batch())
    assert stats["ppo/policy/first_minibatch_ratio_deviation"] < 1e-4
    assert vars(plain.config) == before


class Owner(nn.Module):
    """A module with any object as its configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def test_configurations_of_any_kind_are_put_back() -> None:
    shared = SimpleNamespace(hidden_dropout=0.1, router_jitter_noise=0.2, dropout=0, use_dropout=True, width=0.3)
    frozen = Frozen(0.1)
    model = nn.Sequential(*(Owner(config) for config in (shared, shared, frozen, {"dropout": 0.1}, None, Frozen)))
    before = dict(vars(shared))
    with without_dropout(model):
        assert vars(shared) == before | {"hidden_dropout": 0.0, "router_jitter_noise": 0.0}
        assert frozen.dropout == 0.0
    assert vars(shared) == before
    assert frozen.dropout == 0.1


@dataclass(frozen=True)
class Frozen:
    """Refuses to be assigned to."""

    dropout: float
