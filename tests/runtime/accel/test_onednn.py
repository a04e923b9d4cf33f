"""Layers packed for a rollout: what they compute, that they are gone afterwards, and where nothing is packed."""

from __future__ import annotations

import copy
import logging
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.accel import onednn, products
from ppo_runtime.accel.backends import AccelError, choose
from ppo_runtime.accel.onednn import obstacle, packed, rollout_layers
from ppo_runtime.accel.products import fast_products
from tests.runtime.support.tiny import CAUSAL_FAMILIES, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_trainer

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
here = pytest.mark.skipif(obstacle(nn.Linear(64, 64)) is not None, reason="no oneDNN operators")


def wide(family: str = "llama") -> Any:
    fields = {"gpt2": {"n_embd": 64}, "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}}
    return tiny_model(family, **fields.get(family, WIDE))


def logits(model: Any, rows: int = 2) -> torch.Tensor:
    ids = torch.arange(rows * 3).reshape(rows, 3) % 90
    with torch.no_grad():
        return model(ids).logits


def forwards(model: nn.Module) -> int:
    return sum("forward" in vars(layer) for layer in model.modules())


@here
@pytest.mark.parametrize("rows", [1, 8, 127, 128, 129, 256])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_it_did(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160, bias=bias))
    inputs = torch.randn(rows, 96)
    with torch.no_grad():
        expected = model(inputs)
        with packed(model):
            assert forwards(model) == 1
            torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)


@here
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_packed_model_computes_what_it_did(family: str) -> None:
    model = wide(family)
    expected = logits(model)
    with packed(model):
        assert forwards(model) > 2
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        assert model.state_dict().keys() == wide(family).state_dict().keys()
    assert forwards(model) == 0
    assert torch.equal(logits(model), expected)


@here
@pytest.mark.parametrize("rows", [1, 8, 43, 64])
def test_weights_are_those_of_the_moment(rows: int) -> None:
    """After an optimiser step the packed model is what a fresh one with these weights is."""
    model = wide()
    with packed(model):
        logits(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.arange(6).reshape(2, 3)).logits.square().mean().backward()
    optimiser.step()
    fresh = wide()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    with packed(model):
        torch.testing.assert_close(logits(model, rows), logits(fresh, rows), rtol=1e-4, atol=1e-4)


@here
def test_gradients_go_through_the_layers_as_they_were() -> None:
    model, plain = wide(), wide()
    ids = torch.arange(6).reshape(2, 3)
    with packed(model):
        for one in (model, plain):
            one(ids).logits.square().mean().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@here
def test_the_model_is_as_it_was_after_an_error_too() -> None:
    model = wide()
    own = model.model.layers[0].mlp.up_proj
    own.forward = lambda rows: own.weight.new_zeros(*rows.shape[:-1], own.out_features)  # of somebody else
    expected, kept = logits(model), own.forward
    with packed(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyError), packed(model):
        raise KeyError
    assert own.forward is kept
    assert forwards(model) == 1
    assert torch.equal(logits(model), expected)


@here
def test_an_error_while_packing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = wide(), onednn._forward
    calls: list[Any] = []

    def breaks(layer: Any) -> Any:
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError("no room")
        return forward(layer)

    monkeypatch.setattr(onednn, "_forward", breaks)
    with pytest.raises(MemoryError), packed(model):
        pass
    assert forwards(model) == 0


@here
def test_an_adapters_base_layers_are_packed() -> None:
    from peft import get_peft_model

    model = get_peft_model(wide(), tiny_lora("llama", init_lora_weights=False)).eval()
    expected = logits(model)
    with packed(model.get_base_model()):
        base = [layer for name, layer in model.named_modules() if name.endswith("base_layer")]
        assert base
        # The keys' and values' are too small to be worth it.
        assert sum("forward" in vars(layer) for layer in base) > len(base) / 2
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def made_by_the_parent(model: nn.Module, layer: Any) -> None:
    weight = layer.weight
    del layer._parameters["weight"]
    model.weight_of_layer, layer.weight = weight, weight.detach().clone()
    model.register_forward_pre_hook(lambda *_: setattr(layer, "weight", 1.0 * weight))


MADE: dict[str, Any] = {
    "pruned": lambda _, layer: prune.random_unstructured(layer, "weight", 0.3),
    "pruned bias": lambda _, layer: prune.random_unstructured(layer, "bias", 0.3),
    "weight norm": lambda _, layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda _, layer: nn.utils.spectral_norm(layer),
    "made by the parent": made_by_the_parent,
}


@here
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("inside", [packed, lambda model: fast_products(model, "onednn")], ids=["packed", "products"])
def test_a_weight_that_is_made_at_the_call_is_the_new_one(
    inside: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALLEST", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 96)).eval()
    MADE[how](model, model[0])
    inputs = torch.randn(3, 96)
    with torch.no_grad():
        model(inputs)
        for parameter in model.parameters():  # an optimiser's step
            parameter.add_(torch.randn_like(parameter))
        with inside(model):
            assert "forward" in vars(model[1])
            found = model(inputs)
        torch.testing.assert_close(found, model(inputs), rtol=1e-4, atol=1e-4)


def half() -> nn.Module:
    return wide().bfloat16()


def elsewhere() -> nn.Module:
    return nn.Linear(64, 64, device="meta")


@pytest.mark.parametrize(
    ("make", "said"),
    [(half, "no plain float32 linear layers"), (elsewhere, "is not on the CPU"), (nn.ReLU, "no plain")],
)
def test_nothing_is_packed_where_it_cannot_be(make: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with (
        caplog.at_level(logging.INFO, "ppo_runtime.accel.onednn"),
        rollout_layers(model, "auto", strict=False, steps=99),
    ):
        assert forwards(model) == 0
    [record] = caplog.records
    assert said in record.getMessage()
    assert record.levelno == logging.INFO
    with rollout_layers(model, "onednn", strict=False, steps=1):
        assert forwards(model) == 0
    with pytest.raises(AccelError, match=said):
        rollout_layers(model, "onednn", strict=True, steps=1)


def test_a_torch_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object(), raising=False)
    assert "no oneDNN operators" in (obstacle(wide()) or "")


@here
@pytest.mark.parametrize("wrong", [lambda rows: rows.sum() * torch.nan, lambda rows: rows @ torch.ones(64, 99), None])
def test_layers_that_do_not_agree_are_not_used(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = wide()
    monkeypatch.setattr(onednn, "_forward", lambda layer: wrong)
    with (
        caplog.at_level(logging.INFO, "ppo_runtime.accel.onednn"),
        rollout_layers(model, "onednn", strict=False, steps=99),
    ):
        assert forwards(model) == 0
    [record] = caplog.records
    assert record.levelno == logging.WARNING


@here
@here
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_trial_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    model = wide()
    torch.set_default_dtype(dtype)
    try:
        assert onednn._disagreement(model) is None
    finally:
        torch.set_default_dtype(torch.float32)


@here
def test_the_trial_is_one_under_autocast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    make = onednn._forward
    monkeypatch.setattr(onednn, "_forward", lambda layer: lambda rows: make(layer)(rows) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert "is not what it was" in str(onednn._disagreement(wide()))


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "own_share", lambda: 2**10)
    assert "more than half" in (obstacle(wide()) or "")


@here
@pytest.mark.parametrize(
    ("accel", "steps", "expected"),
    [("auto", 50, True), ("auto", 2, False), ("onednn", 2, True), ("eager", 50, False), ("ipex", 50, True)],
)
def test_rollouts_are_packed_where_accel_allows_it(
    accel: str, steps: int, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And sample what they sample without."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(wide())
    queries = [torch.arange(3, 7), torch.arange(3, 5)]

    def drawn(accel: str) -> tuple[list[list[int]], list[int]]:
        settings = {name: value for name, value in SETTINGS.items() if name != "accel"}
        with caplog.at_level(logging.CRITICAL, "ppo_runtime"):
            trainer = PPOTrainer(PPOConfig(accel=accel, **settings), model, None, tiny_tokenizer())
        counted: list[int] = []
        hook = model.pretrained_model.register_forward_pre_hook(lambda module, _: counted.append(forwards(module)))
        torch.manual_seed(0)
        rows = trainer.generate(queries, max_new_tokens=steps, do_sample=True, top_k=0)
        hook.remove()
        return [row.tolist() for row in rows], counted

    rows, counted = drawn(accel)
    assert (max(counted) > 0) is expected
    assert forwards(model) == 0
    assert rows == drawn("eager")[0]


def test_frozen_models_are_eager_under_onednn() -> None:
    choice = choose("onednn", strict=True)
    assert choice.backend == "eager"
    assert "rollouts" in choice.reason
    assert make_trainer(accel="onednn").acceleration.requested == "onednn"


def test_a_merged_adapter_is_left_as_it_is() -> None:
    """Switched off, it is taken out of the weights by the first pass, and packed copies would still hold it."""
    adapter = tiny_lora("llama", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama", hidden_size=64, intermediate_size=96), adapter)
    assert onednn.obstacle(model) is None
    model.merge_adapter()
    assert "merged" in str(onednn.obstacle(model))
    model.unmerge_adapter()
    assert onednn.obstacle(model) is None
