"""What policy and reference may have in common: nothing that trains, by whichever way it came to be shared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ppo_runtime import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.references import create_reference_model
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch

Sharing = Callable[[Any], Any]


def parent_of(family: str) -> Any:
    return AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead


def policy_of(family: str = "llama", *, lora: bool = False) -> Any:
    torch.manual_seed(0)
    return parent_of(family).from_pretrained(
        tiny_model(family, layers=3), **({"peft_config": tiny_lora(family)} if lora else {})
    )


def trainer_of(policy: Any, reference: Any) -> PPOTrainer:
    return PPOTrainer(PPOConfig(**SETTINGS), policy, reference, tiny_tokenizer())


def apart(policy: Any) -> Any:
    return copy.deepcopy(policy.pretrained_model)


def same_tensor(policy: Any) -> Any:
    """One parameter object in both."""
    reference = apart(policy)
    reference.get_input_embeddings().weight = policy.pretrained_model.get_input_embeddings().weight
    return reference


def same_memory(policy: Any) -> Any:
    """Two parameter objects over one memory: freezing one would leave the other training, and both moving."""
    reference = apart(policy)
    head = reference.get_output_embeddings()
    head.weight = nn.Parameter(policy.pretrained_model.get_output_embeddings().weight.detach())
    return reference


def thawed(policy: Any) -> Any:
    """Shared and frozen on purpose, but set to train again."""
    reference = create_reference_model(policy, 1)
    policy.requires_grad_(True)
    return reference


SHARED: dict[str, Sharing] = {
    "the policy itself": lambda policy: policy,
    "its transformers model": lambda policy: policy.pretrained_model,
    "another wrapper of it": lambda policy: type(policy)(policy.pretrained_model),
    "its trunk": lambda policy: policy.pretrained_model.base_model,
    "one tensor": same_tensor,
    "one memory": same_memory,
    "layers that train again": thawed,
}
SHARED_ADAPTERS: dict[str, Sharing] = {
    "the policy itself": lambda policy: policy,
    "its PEFT model": lambda policy: policy.pretrained_model,
    "another wrapper of it": lambda policy: type(policy)(policy.pretrained_model),
    "the adapter's own module": lambda policy: policy.pretrained_model.base_model,
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("lora", "way"), [(False, way) for way in SHARED] + [(True, way) for way in SHARED_ADAPTERS], ids=str
)
def test_parameters_that_train_are_not_shared(family: str, lora: bool, way: str) -> None:
    policy = policy_of(family, lora=lora)
    reference = (SHARED_ADAPTERS if lora else SHARED)[way](policy)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in policy.named_parameters()}
    shares = r"ref_model shares \d+ of the \d+ parameters that train .*such as '.*None"
    if way == "the adapter's own module" or (way == "its trunk" and reference is not policy.pretrained_model):
        shares = r"ref_model is a \w+, (which has no language-model head|expected a value-head model)"  # said earlier
    with pytest.raises((ValueError, TypeError), match=shares):
        trainer_of(policy, reference)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == before[name][0], f"{name}: a refused reference freezes nothing"
        assert torch.equal(parameter, before[name][1])


OWN_BASES: dict[str, Sharing] = {
    "the base": transformers_model,
    "the base in a wrapper": lambda policy: type(policy)(transformers_model(policy)),
}


@pytest.mark.parametrize("way", OWN_BASES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_peft_policys_own_base_is_the_policy_without_its_adapter(family: str, way: str) -> None:
    expected = trainer_of(policy_of(family, lora=True), None)
    policy = policy_of(family, lora=True)
    trainer = trainer_of(policy, OWN_BASES[way](policy))
    assert trainer.ref_model is None
    history = [(one.step(*make_batch()), one.step(*make_batch(seed=1))) for one in (expected, trainer)]
    for one, other in zip(*history, strict=True):
        assert one["objective/kl"] == other["objective/kl"]
    assert history[1][1]["objective/kl"] != 0.0, "the adapter trains"
    assert any(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name)


LEGAL: dict[str, Sharing] = {
    "nothing": apart,
    "frozen layers": lambda policy: create_reference_model(policy, 2),
    "frozen layers of a plain model": lambda policy: create_reference_model(policy.pretrained_model, 2),
    "another policy's model": lambda policy: tiny_model(policy.config.model_type, layers=3, seed=1),
}


@pytest.mark.parametrize("way", LEGAL)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_what_is_frozen_in_both_may_be_shared(family: str, way: str) -> None:
    policy = policy_of(family)
    reference = LEGAL[way](policy)
    trainer = trainer_of(policy, reference)
    before = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    frozen = [p.detach().clone() for p in reference.parameters()]
    assert any(not name.startswith("v_head.") for name in before)
    trainer.step(*make_batch())
    after = dict(policy.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert any(not name.startswith("v_head.") for name in moved), "the policy trains, not its value head alone"
    assert all(torch.equal(p, value) for p, value in zip(reference.parameters(), frozen, strict=True))
