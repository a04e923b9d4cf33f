"""What a run is made of: a policy with its tokenizer, and a dataset of prompts. Scores are in test_pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_runtime import AutoModelForCausalLMWithValueHead
from ppo_runtime.recipe import load_policy, tokenized
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A policy with a head that is not 0, and its tokenizer, which pads on the right."""
    model = AutoModelForCausalLMWithValueHead(tiny_model("llama"), v_head_init_strategy="normal")
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_policy_is_loaded_with_its_tokenizer(directory: Path) -> None:
    """The head that is stored, prompts padded on the left, and the model's own arguments reach it."""
    model, tokenizer = load_policy(directory, dtype=torch.bfloat16)
    assert tokenizer.padding_side == "left"
    assert model.pretrained_model.dtype == torch.bfloat16
    stored = AutoModelForCausalLMWithValueHead.from_pretrained(directory).v_head.summary.weight
    assert stored.any()
    torch.testing.assert_close(model.v_head.summary.weight.float(), stored.float())


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"Unrecognized model in {tmp_path}"):
        load_policy(tmp_path)


def test_a_head_of_zeros_values_everything_at_zero(directory: Path) -> None:
    model, tokenizer = load_policy(directory, zero_head=True)
    values = model(**tokenizer(["ab"], return_tensors="pt"))[2]
    torch.testing.assert_close(values, torch.zeros_like(values))


@pytest.mark.parametrize("special", [False, True])
def test_prompts_become_a_dataset(special: bool) -> None:
    """Row for row the text and its ids, with the tokenizer's special tokens where they are asked for."""
    tokenizer, prompts = tiny_tokenizer(), ["ab", "cde", "f"]
    dataset = tokenized(prompts, tokenizer, add_special_tokens=special)
    assert list(dataset["query"]) == prompts
    assert list(dataset["input_ids"]) == [tokenizer(p, add_special_tokens=special)["input_ids"] for p in prompts]


@pytest.mark.parametrize("prompts", ["hello", []], ids=repr)
def test_what_is_no_list_of_prompts_is_named(prompts: Any) -> None:
    """One text is a sequence of texts, letter by letter."""
    with pytest.raises(ValueError, match=r"prompts is .*, expected a list of texts"):
        tokenized(prompts, tiny_tokenizer())
