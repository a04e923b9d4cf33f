"""The model, tokenizer and prompts that the demo ships."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(find_spec("ppo_runtime").submodule_search_locations[0], "demo", "assets")  # found, not imported
# From the eighth chapter of Emma, which the model never saw.
SENTENCE = (
    "While she was gone, Mr. Knightley called, and sat some time with Mr. Woodhouse and Emma, till Mr. Woodhouse, "
    "who had previously made up his mind to walk out, was persuaded by his daughter not to defer it."
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    lines = (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_everything_is_there_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    wanted = "config.json model.safetensors tokenizer.json tokenizer_config.json prompts.jsonl README.md"
    assert sizes.keys() >= set(wanted.split())
    assert not {name for name in sizes if name.startswith("checkpoint")}
    assert sizes["model.safetensors"] <= 8e6
    assert sum(sizes.values()) <= 10e6


def test_the_model_is_small_and_plain(model: Any) -> None:
    assert 1e6 < model.num_parameters() < 5e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 1)


def test_tokenizer_gives_every_text_back(tokenizer: Any, model: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    for text in (SENTENCE, "naïve  café — £3\n\t“ok”", ' "Yes."', "<|endoftext|>", "🙂"):
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokens) == text
        assert all(0 <= token < len(tokenizer) for token in tokens)
    assert tokenizer("Emma")["input_ids"][-1] != tokenizer.eos_token_id  # nothing is added unasked


def test_the_model_knows_its_language(model: Any, tokenizer: Any) -> None:
    tokens = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
        out_of_order = model(shuffled, labels=shuffled).loss.item()
    assert loss < 0.65 * math.log(model.config.vocab_size)
    assert loss + 1.0 < out_of_order


def test_left_padding_changes_nothing(model: Any, tokenizer: Any, prompts: list[dict[str, str]]) -> None:
    """The prompts are left-padded in a rollout; the mask must make that invisible."""
    texts = [row["prompt"] for row in prompts[:4]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits[:, -1]
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-3, rtol=1e-3)


def test_prompts_are_unfinished_openings(prompts: list[dict[str, str]], tokenizer: Any) -> None:
    for row in prompts:
        assert row.keys() == {"prompt", "split"}
        assert row["split"] in ("train", "eval")
        assert 6 <= len(row["prompt"].split()) <= 12
        assert row["prompt"][0].isupper()
        assert row["prompt"][-1].isalnum()
        assert len(tokenizer(row["prompt"])["input_ids"]) <= 32


def test_prompts_are_enough_distinct_and_mixed(prompts: list[dict[str, str]]) -> None:
    train = {row["prompt"].casefold() for row in prompts if row["split"] == "train"}
    held = {row["prompt"].casefold() for row in prompts if row["split"] == "eval"}
    assert len(train) >= 300
    assert len(held) == 64
    assert len(train) + len(held) == len(prompts)  # none twice, none in both
    assert {row["split"] for row in prompts[:50]} == {"train", "eval"}  # shuffled


def test_prompts_are_neutral(prompts: list[dict[str, str]]) -> None:
    """The reward of the demo is sentiment: a prompt that brings its own would decide the outcome."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    assert all(abs(analyser.polarity_scores(row["prompt"])["compound"]) < 0.05 for row in prompts)
