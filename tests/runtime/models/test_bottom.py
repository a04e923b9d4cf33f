"""Frozen bottom layers run once: found by what trains, shared by the same tensors alone, and without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig

from ppo_runtime.accel import products
from ppo_runtime.accel.products import fast_products
from ppo_runtime.learning import forward
from ppo_runtime.learning.forward import Bottom, Rows, evaluate, lay_out
from ppo_runtime.models.bottom import frozen_depth, recorded, replayed, shared_depth
from ppo_runtime.models.heads import hidden_states, mask_positions
from ppo_runtime.models.modes import without_dropout
from ppo_runtime.models.references import create_reference_model, reference_context
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead
from tests.operations import Operations
from tests.runtime.support.tiny import CAUSAL_FAMILIES, VOCAB_SIZE, tiny_lora, tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

LAYERS, SHARED = 4, 3


def policy(family: str = "llama") -> Any:
    torch.manual_seed(0)  # for the value head
    return AutoModelForCausalLMWithValueHead(tiny_model(family, layers=LAYERS))


def adapter_in(layers: list[int], family: str = "llama", **fields: Any) -> Any:
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
    return tiny_lora(family, layers_to_transform=layers, target_modules=targets, **fields)


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def without_adapter(model: Any) -> Any:
    """The policy as a pass of its own reference enters it."""

    @contextmanager
    def entered() -> Iterator[Any]:
        with reference_context(model):
            yield model

    return entered


def rows() -> Rows:
    generator = torch.Generator().manual_seed(2)
    pairs = ((2, 3), (9, 14), (1, 1))
    draw = [[torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in pair] for pair in pairs]
    queries, responses = zip(*draw, strict=True)
    return lay_out(queries, responses, None, pad_token_id=0, decoder_start_token_id=None, device=torch.device("cpu"))


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_the_depth_is_that_of_what_trains(family: str) -> None:
    model = policy(family)
    assert frozen_depth(model) == 0
    create_reference_model(model, SHARED)
    assert frozen_depth(model) == SHARED
    next(model.pretrained_model.get_input_embeddings().parameters()).requires_grad_(True)
    assert frozen_depth(model) == 0


def test_only_what_is_below_counts() -> None:
    model = policy()
    model.requires_grad_(False)
    assert frozen_depth(model) == LAYERS
    layers = model.pretrained_model.base_model.layers
    layers[2].mlp.up_proj.weight.requires_grad_(True)
    assert frozen_depth(model) == 2
    layers[0].input_layernorm.weight.requires_grad_(True)
    assert frozen_depth(model) == 0


def test_an_encoder_decoder_has_no_bottom_of_this_kind() -> None:
    model = tiny_model("t5").requires_grad_(False)
    assert frozen_depth(model) == 0


@pytest.mark.parametrize("layers", [[0], [2, 3], [1]])
def test_adapters_count_where_they_are(layers: list[int]) -> None:
    model = peft.get_peft_model(tiny_model("llama", layers=LAYERS), adapter_in(layers))
    depth = min(layers)
    assert frozen_depth(model) == depth
    assert shared_depth(model, without_adapter(AutoModelForCausalLMWithValueHead(model)), depth) == depth


def test_adapters_that_train_no_more_are_not_shared_with_the_model_without_them() -> None:
    lora = adapter_in([0, 3], init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead(peft.get_peft_model(tiny_model("llama", layers=LAYERS), lora))
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    assert frozen_depth(model) == 3
    assert shared_depth(model, without_adapter(model), 3) == 0


def test_a_reference_shares_what_are_the_same_tensors() -> None:
    model = policy()
    reference = create_reference_model(model, SHARED)
    for depth, other, shared in (
        (SHARED, reference, SHARED),
        (SHARED + 1, reference, 0),
        (SHARED, reference.pretrained_model, SHARED),
        (SHARED, copy.deepcopy(reference), 0),  # as good today, and not tomorrow
    ):
        assert shared_depth(model, lambda other=other: nullcontext(other), depth) == shared
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("packs", [True, False], ids=["end to end", "padded"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointing", "re-entrant checkpointing"])
@pytest.mark.parametrize("family", [family for family in CAUSAL_FAMILIES if family != "opt"])
def test_going_on_from_the_bottom_is_the_whole_pass(
    family: str, checkpointing: bool | None, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = policy(family), rows()
    create_reference_model(model, SHARED)
    depth = frozen_depth(model)
    if checkpointing is not None:
        # transformers 5.24 has it by another name.
        inner = model.pretrained_model
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": checkpointing})
        assert frozen_depth(model) == depth
    with recorded(model, depth) as seen:
        hidden_states(model, batch.input_ids, batch.attention_mask, mask_positions(batch.attention_mask))
    lengths = batch.attention_mask.sum(-1).tolist()
    begun = batch._replace(bottom=Bottom(depth, [x[:n] for x, n in zip(seen[0], lengths, strict=True)]))
    # Others of the batch, in another order, as minibatches have them.
    index = torch.tensor([2, 0, 1])
    monkeypatch.setattr(forward, "packing_pays", lambda *_: packs)
    found: list[dict[str, Tensor]] = []
    for part in (batch.select(index), begun.select(index)):
        model.zero_grad()
        with without_dropout(model):  # and with checkpointing, if it is on
            now = evaluate(model, part)
            assert now.values is not None
            (now.logprobs.exp() + now.values).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        found[-1] |= {"logprobs": now.logprobs.detach(), "values": now.values.detach()}
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_no_trace_is_left_even_where_a_pass_fails() -> None:
    model, batch = policy(), rows()
    layers = model.pretrained_model.base_model.layers

    def failing() -> None:
        with replayed(model, 2, torch.zeros(3, 23, 16)):
            assert "forward" in vars(layers[1])
            assert "forward" not in vars(layers[2])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not any("forward" in vars(layer) for layer in layers)
    layers[0].forward = own = layers[0].forward  # somebody's, such as accelerate's
    with replayed(model, 1, torch.zeros(3, 23, 16)):
        pass
    assert vars(layers[0])["forward"] is own
    del layers[0].forward
    before = [len(layer._forward_hooks) for layer in layers]
    with recorded(model, 1):
        evaluate(model, batch)
    frozen_depth(model.requires_grad_(False))
    assert [len(layer._forward_hooks) for layer in layers] == before


@pytest.mark.parametrize("adapter", [False, True], ids=["shared layers", "LoRA above"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_step_is_what_it_is_with_every_layer_in_every_pass(
    family: str, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[dict[str, Any], list[Tensor], int]] = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(forward, "frozen_depth", lambda model: 0)
        # Not Adam, which makes steps of rounding errors.
        make = partial(make_trainer, family, optimizer_of=lambda model: torch.optim.SGD(trained(model), lr=0.03))
        trainer = make(peft_config=adapter_in([1], family)) if adapter else make(num_shared_layers=1)
        runs: list[int] = []
        named = trainer.model.named_modules()
        layer = next(part for name, part in named if name.endswith((".layers.0", ".h.0")))
        innermost = next(part for part in layer.modules() if not list(part.children()))
        innermost.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        batch = make_batch()
        stats = [untimed(trainer.step(*batch)) for _ in range(2)]
        found.append((stats[1], [p.detach().clone() for p in trainer.model.parameters()], len(runs)))
    (mine, weights, runs_once), (theirs, expected, runs_always) = found
    for name, value in theirs.items():
        torch.testing.assert_close(
            torch.as_tensor(mine[name]), torch.as_tensor(value), rtol=1e-3, atol=1e-5, msg=name, equal_nan=True
        )
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert runs_once < runs_always / 2


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=VOCAB_SIZE),
        GPTNeoConfig(
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            vocab_size=VOCAB_SIZE,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_that_give_more_than_a_tensor_run_in_every_pass(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.requires_grad_(False)
    parameters = list(model.parameters())
    parameters[-1].requires_grad_(True)
    assert frozen_depth(model) == 0


def test_upper_layers_that_need_the_lower_ones_run_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they read keys that lower layers have left behind."""
    model, left = policy(), {}
    create_reference_model(model, SHARED)
    layers = model.pretrained_model.base_model.layers
    below, above = layers[0].forward, layers[3].forward

    def leaves(*args: Any, **kwargs: Any) -> Any:
        left["keys"] = 1
        return below(*args, **kwargs)

    def needs(*args: Any, **kwargs: Any) -> Any:
        left.pop("keys")
        return above(*args, **kwargs)

    monkeypatch.setattr(layers[0], "forward", leaves)
    monkeypatch.setattr(layers[3], "forward", needs)
    assert frozen_depth(model) == 0


def test_the_depth_follows_what_changes_without_a_flag() -> None:
    """Checkpointing asks for embeddings that require grad, though nothing there trains; another adapter is active."""
    model = AutoModelForCausalLMWithValueHead(
        peft.get_peft_model(tiny_model("llama", layers=LAYERS), adapter_in([2, 3]))
    )
    assert frozen_depth(model) == 2
    model.pretrained_model.enable_input_require_grads()
    assert frozen_depth(model) == 2
    model.pretrained_model.disable_input_require_grads()

    model.pretrained_model.add_adapter("other", adapter_in([0, 1], init_lora_weights=False))
    depth, alone = frozen_depth(model), without_adapter(model)
    assert shared_depth(model, alone, depth) == depth == 2
    model.pretrained_model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and "default" in name)
    assert frozen_depth(model) == 2
    assert shared_depth(model, alone, 2) == 0


def test_the_search_costs_passes_over_a_few_tokens_and_no_gradient() -> None:
    """Nothing as large as the embeddings is made, which a gradient of what is frozen would be."""
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead(tiny_model("llama", layers=LAYERS, vocab_size=5000))
    reference = create_reference_model(model, SHARED)
    with Operations() as operations:
        depth = frozen_depth(model)
        assert shared_depth(model, lambda: nullcontext(reference), depth) == depth == SHARED
    assert operations.largest().numel < model.pretrained_model.get_input_embeddings().weight.numel() / 10


def test_shared_layers_are_found_whatever_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 1)
    model = policy()
    reference = create_reference_model(model, SHARED)
    other = create_reference_model(model)
    with fast_products(model, "onednn"), fast_products(reference, "onednn"):
        assert shared_depth(model, lambda: nullcontext(reference), SHARED) == SHARED
        assert shared_depth(model, lambda: nullcontext(other), SHARED) == 0
