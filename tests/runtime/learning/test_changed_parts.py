"""What became of models and optimiser after the trainer was made: refused or said by name, before anything changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.runtime.support.tiny import VOCAB_SIZE, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer, untimed


def state(trainer: Any) -> Any:
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return weights, trainer.state_dict(), copy.deepcopy(trainer.optimizer.state_dict()["state"])


def same(mine: Any, theirs: Any) -> bool:
    """Equal, tensors by value."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in mine.items())
    if isinstance(mine, tuple):
        return all(map(same, mine, theirs))
    return mine == theirs


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bfloat16": (lambda t: t.model.to(torch.bfloat16), "bfloat16, expected float32 as when the trainer was made"),
    "float16": (lambda t: t.model.to(torch.float16), "float16, expected float32 as when the trainer was made"),
    "float64": (lambda t: t.model.double(), "float32, expected torch.float64 like the parameter"),
    "frozen": (lambda t: t.model.requires_grad_(False), "model has no parameter that trains"),
    "vocabulary": (
        lambda t: t.ref_model.pretrained_model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False),
        f"ref_model has a vocabulary of {VOCAB_SIZE + 5}, expected {VOCAB_SIZE} like model",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_refuses_what_the_models_have_become(name: str) -> None:
    change, message = CHANGES[name]
    trainer, batch = make_trainer(), make_batch()
    trainer.step(*batch)
    change(trainer)
    before = state(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.step(*batch)
    assert same(state(trainer), before)
    assert trainer.broken_off is None


def test_a_policy_of_more_tokens_is_refused_by_both_vocabularies() -> None:
    trainer = make_trainer()
    trainer.model.pretrained_model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB_SIZE}, expected {VOCAB_SIZE + 5} like model"):
        trainer.step(*make_batch())


def test_half_precision_is_refused_before_there_are_moments() -> None:
    trainer = make_trainer()
    trainer.model.to(torch.float16)
    with pytest.raises(ValueError, match=r"is torch\.float16, expected float32"):
        trainer.step(*make_batch())


def test_a_merged_adapter_trains_nothing_and_is_refused() -> None:
    """It was taken out of the weights by the first pass, and got no gradient in any."""
    trainer, (queries, responses, scores) = make_trainer(peft_config=tiny_lora("llama")), make_batch()
    inner = trainer.model.pretrained_model
    inner.merge_adapter()
    assert len(trainer.generate(queries, max_new_tokens=2)) == len(queries)
    before = state(trainer)
    with pytest.raises(ValueError, match=r"merged into its weights.*unmerge_adapter\(\) first"):
        trainer.step(queries, responses, scores)
    assert same(state(trainer), before)
    assert any(getattr(part, "merged", False) for part in inner.modules())
    with pytest.raises(ValueError, match="merged into its weights"):
        PPOTrainer(PPOConfig(**SETTINGS), trainer.model, None, tiny_tokenizer())
    inner.unmerge_adapter()
    adapter = next(value for name, value in inner.named_parameters() if "lora_B" in name)
    kept = adapter.detach().clone()
    trainer.step(queries, responses, scores)
    assert not torch.equal(adapter, kept)


def test_a_model_made_where_nothing_can_train_is_refused() -> None:
    with torch.inference_mode():
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"made inside torch\.inference_mode\(\)"):
        PPOTrainer(PPOConfig(**SETTINGS), model, None, tiny_tokenizer())


def test_what_trains_beside_the_optimiser_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    bottom = model.pretrained_model.model.layers[0].requires_grad_(False)
    trainer = PPOTrainer(PPOConfig(**SETTINGS), model, None, tiny_tokenizer())

    def sentences() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer.step(*make_batch())
        return [record.getMessage() for record in caplog.records if "stay as" in record.getMessage()]

    assert sentences() == []
    bottom.requires_grad_(True)
    (sentence,) = sentences()
    assert "(the first: pretrained_model.model.layers.0.self_attn.q_proj.weight)" in sentence
    assert sentences() == []
    trainer.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    kept = bottom.mlp.up_proj.weight.detach().clone()
    assert sentences() == []
    assert not torch.equal(bottom.mlp.up_proj.weight, kept)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_number_depends_on_the_default_dtype(
    dtype: torch.dtype, kl_penalty: str, default_dtype: Callable[[torch.dtype], None]
) -> None:
    def acted(around: torch.dtype) -> Any:
        trainer, (queries, responses, scores) = (
            make_trainer(kl_penalty=kl_penalty, use_score_scaling=True),
            make_batch(),
        )
        torch.manual_seed(0)
        default_dtype(around)
        rows = trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=True, top_k=0)
        stats = [untimed(trainer.step(queries, responses, scores)) for _ in range(2)]
        assert torch.get_default_dtype() is around
        default_dtype(torch.float32)
        numbers = [{key: torch.as_tensor(value) for key, value in one.items()} for one in stats]
        return dict(enumerate(rows)), dict(enumerate(numbers)), trainer.model.state_dict()

    assert same(acted(dtype), acted(torch.float32))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_outputs_as_tuples_are_read_by_their_names(family: str) -> None:
    """In a step: transformers' own ``generate`` can't do with tuples."""
    plain, tuples = make_trainer(family), make_trainer(family)
    for model in (tuples.model, tuples.ref_model):
        parts: list[Any] = list(model.modules())
        for part in parts:
            if hasattr(part, "config"):
                part.config.return_dict = False
    for trainer in (plain, tuples):
        trainer.step(*make_batch())
    assert same(plain.model.state_dict(), tuples.model.state_dict())


def test_an_adapter_that_is_switched_off_is_refused() -> None:
    """As an interrupt may leave it: a step of the model without it would train nothing."""
    trainer, batch = make_trainer(peft_config=tiny_lora("llama")), make_batch()
    layers = trainer.model.pretrained_model.base_model
    layers.disable_adapter_layers()
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(parameter in trainer.optimizer.state or parameter.ndim == 2)
    before = state(trainer)
    with pytest.raises(ValueError, match=r"switched off.*enable_adapter_layers\(\) first"):
        trainer.step(*batch)
    assert same(state(trainer), before)
    layers.enable_adapter_layers()
