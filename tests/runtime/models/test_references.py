"""References stay what they were while the policy trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_runtime.models.references import create_reference_model, reference_context
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from tests.runtime.support.tiny import FAMILIES, tiny_lora, tiny_model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # for the value heads; `tiny_model` has a seed of its own


IDS = torch.tensor([[5, 9, 33, 70], [21, 4, 4, 60]])


def wrapped(family: str = "gpt2", **kwargs: Any) -> Any:
    wrapper = AutoModelForSeq2SeqLMWithValueHead if family == "t5" else AutoModelForCausalLMWithValueHead
    return wrapper.from_pretrained(tiny_model(family, layers=3), **kwargs)


def outputs(model: nn.Module, family: str = "gpt2") -> tuple[Tensor, Tensor]:
    more = {"decoder_input_ids": IDS.flip(1)} if family == "t5" else {}
    logits, _, value = model(IDS, attention_mask=torch.ones_like(IDS), **more)
    return logits, value


def train(model: nn.Module, family: str = "gpt2") -> None:
    """Two steps over everything that trains, towards nothing in particular."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        logits, value = outputs(model, family)
        (logits.logsumexp(-1).sum() + logits[..., 3].sum() + value.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [None, 2])
def test_the_reference_does_not_move_when_the_policy_does(family: str, shared: int | None) -> None:
    policy = wrapped(family).train()
    reference = create_reference_model(policy, shared)
    assert not any(part.training for part in reference.modules())
    assert all(part.training for part in policy.modules())
    policy.eval()  # for the value head's dropout
    assert not any(p.requires_grad for p in reference.parameters())
    assert any(p.requires_grad for p in policy.pretrained_model.parameters())
    with torch.no_grad():
        before = outputs(reference, family)
        for own, copied in zip(outputs(policy, family), before, strict=True):
            assert torch.equal(own, copied)
    train(policy, family)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(reference, family), strict=True))
        assert not torch.allclose(before[0], outputs(policy, family)[0], atol=1e-2)


def test_a_full_copy_shares_nothing() -> None:
    policy = wrapped()
    for shared in (None, 0):
        ours, theirs = pointers(policy), pointers(create_reference_model(policy, shared))
        assert not set(ours.values()) & set(theirs.values())
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bottom_layers_are_the_same_tensors_and_frozen(family: str) -> None:
    policy = wrapped(family)
    reference = create_reference_model(policy, 2)
    theirs = pointers(reference)
    same = {name for name, pointer in pointers(policy).items() if pointer == theirs[name]}
    stacks = {
        "gpt2": ["transformer.h"],
        "gpt_neox": ["gpt_neox.layers"],
        "opt": ["model.decoder.layers"],
        "t5": ["encoder.block", "decoder.block"],
    }.get(family, ["model.layers"])
    for stack in stacks:
        for layer in range(3):
            names = {name for name in theirs if f"{stack}.{layer}." in name}
            assert names
            assert names <= same if layer < 2 else not names & same
    embeddings = policy.pretrained_model.get_input_embeddings().weight
    assert embeddings.data_ptr() == reference.pretrained_model.get_input_embeddings().weight.data_ptr()
    assert not any(name.startswith("v_head.") for name in same)
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad == (name not in same), name


def test_a_plain_transformers_model_will_do() -> None:
    policy = tiny_model("llama")
    reference = create_reference_model(policy, 1)
    assert type(reference) is type(policy)
    assert reference.model.layers[0].mlp.up_proj.weight is policy.model.layers[0].mlp.up_proj.weight
    assert reference.model.layers[1].mlp.up_proj.weight is not policy.model.layers[1].mlp.up_proj.weight


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([nn.ModuleDict({"inner": nn.Linear(3, 3)}) for _ in range(11)])
        self.out = nn.Linear(3, 5)


@pytest.mark.parametrize("pattern", ["blocks.{layer}", "blocks.{layer}.inner"])
def test_a_pattern_of_ones_own(pattern: str) -> None:
    policy = Blocks()
    reference = create_reference_model(policy, 2, pattern)
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    # Not layer 10, whose name begins like layer 1's.
    layers = {f"blocks.{i}.inner.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert frozen == {"words.weight"} | layers
    assert reference.blocks[10]["inner"].weight is not policy.blocks[10]["inner"].weight


def test_errors_name_values_and_remedies() -> None:
    policy = wrapped()
    with pytest.raises(ValueError, match=r"num_shared_layers is 4, but 'pretrained_model.transformer.h.' has only 3"):
        create_reference_model(policy, 4)
    odd: Any
    for odd in (-1, True, 1.5, "1"):
        with pytest.raises(ValueError, match=f"num_shared_layers is {odd!r}, expected None or a whole number from 0"):
            create_reference_model(policy, odd)
    with pytest.raises(ValueError, match=r"no layers match 'no.{layer}' in .*named like .*'pretrained_model.trans"):
        create_reference_model(policy, 1, "no.{layer}")
    with pytest.raises(ValueError, match=r"pattern is 'transformer.h', expected {layer}"):
        create_reference_model(policy, 1, "transformer.h")
    with pytest.raises(ValueError, match=r"no layers match .*'blocks.0.inner.|'words"):
        create_reference_model(Blocks(), 1)
    assert all(p.requires_grad for p in policy.parameters()), "a refused call must freeze nothing"


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_without_its_adapter_a_peft_policy_is_the_base_model(family: str) -> None:
    base = wrapped(family)
    with torch.no_grad():
        expected = outputs(base, family)[0]
    policy = wrapped(family, peft_config=tiny_lora(family))
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("v_head.") for name in trainable)

    train(policy, family)

    state = dict(policy.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    with torch.no_grad(), reference_context(policy):
        assert torch.equal(outputs(policy, family)[0], expected)
    assert not torch.allclose(outputs(policy, family)[0], expected, atol=1e-3)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable


def test_the_adapter_returns_after_an_exception() -> None:
    policy = wrapped(peft_config=tiny_lora())
    train(policy)
    with torch.no_grad():
        adapted = outputs(policy)[0]
        with pytest.raises(RuntimeError, match="in the middle"), reference_context(policy):
            raise RuntimeError("in the middle")
        assert torch.equal(outputs(policy)[0], adapted)


def test_a_frozen_adapter_stays_frozen() -> None:
    policy = wrapped(peft_config=tiny_lora())
    policy.pretrained_model.requires_grad_(False)
    with reference_context(policy):
        pass
    assert not any(p.requires_grad for p in policy.pretrained_model.parameters())


def test_a_copy_of_a_peft_policy_keeps_its_adapter_as_it_is() -> None:
    policy = wrapped(peft_config=tiny_lora())
    train(policy)
    reference = create_reference_model(policy)
    with torch.no_grad():
        before = outputs(policy)[0]
        assert torch.equal(outputs(reference)[0], before)
    train(policy)
    with torch.no_grad():
        assert torch.equal(outputs(reference)[0], before)


def test_contexts_and_copies_point_to_each_other_when_mixed_up() -> None:
    no_adapter = pytest.raises(ValueError, match=r"GPT2LMHeadModel has no PEFT adapter.*create_reference_model")
    with no_adapter, reference_context(wrapped()):
        pass
    with pytest.raises(ValueError, match=r"num_shared_layers is 1.*reference_context"):
        create_reference_model(wrapped(peft_config=tiny_lora()), 1)
