"""The distribution that responses are drawn from: plain unless asked otherwise, and said where it is another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, WatermarkingConfig

from ppo_runtime.rollout.sampling import NEUTRAL, plain
from ppo_runtime.rollout.settings import fields
from ppo_runtime.rollout.values import REFUSED
from tests.runtime.support.tiny import EOS_ID
from tests.runtime.support.trainers import make_batch, make_trainer

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8])]
SAMPLED = {"do_sample": True, "max_new_tokens": 3}

# Settings that leave the distribution of a response's next token alone: how long, how it stops, how it is computed.
ELSEWHERE = {
    *("max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("decoder_start_token_id", "do_sample", "transformers_version", "low_memory", "prefill_chunk_size"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    "continuous_batching_config",
    # Of beam search, which `num_beams` names.
    *("early_stopping", "length_penalty"),
    # A constant for every token, and a mend of numbers that are no numbers.
    *("renormalize_logits", "remove_invalid_values"),
    # Of assisted decoding, which is refused by the settings that begin it.
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "speculation_type"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
}
# Another value than the neutral one, for each that has one.
DEPARTING: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.1,
    "top_h": 0.4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "num_beams": 2,
    "repetition_penalty": 1.2,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "min_length": 6,
    "min_new_tokens": 2,
    "bad_words_ids": [[60]],
    "sequence_bias": [[[60], -2.0]],
    "suppress_tokens": [60],
    "begin_suppress_tokens": [60],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": EOS_ID,
    "exponential_decay_length_penalty": (1, 1.5),
    "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(),
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """The trainer's warnings so far."""

    def messages() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("ppo_runtime")]

    caplog.set_level(logging.WARNING)
    return messages


def test_every_setting_of_the_installed_transformers_is_known() -> None:
    """A setting that a later release adds is decided on before it moves a distribution unseen."""
    known = [*NEUTRAL, *REFUSED, *ELSEWHERE]
    assert len(known) == len(set(known)), "a setting is classified once"
    assert fields() - set(known) == set()
    assert NEUTRAL.keys() == DEPARTING.keys()


@pytest.mark.parametrize("name", [name for name in NEUTRAL if name in fields()])
@pytest.mark.parametrize("door", ["keyword", "generation_config", "the model's own"])
def test_every_departure_is_named_and_neutralised(name: str, door: str, said: Any) -> None:
    """By whichever door it comes; over the model's own, plain settings hold and nothing is said."""
    trainer = make_trainer(batch_size=2)
    value, options = DEPARTING[name], dict[str, Any](SAMPLED)
    if door == "keyword":
        options[name] = value
    elif door == "generation_config":
        options = {"generation_config": GenerationConfig(**options, **{name: value})}
    else:
        setattr(trainer.model.pretrained_model.generation_config, name, value)
    trainer.generate(QUERIES, **options)
    [message] = said()
    assert f"{name}=" in message
    assert "negative" in message
    trainer.generate(QUERIES, **options)
    assert len(said()) == 1, "once"
    again = make_trainer(batch_size=2)
    again.model.pretrained_model.generation_config = trainer.model.pretrained_model.generation_config
    again.generate(QUERIES, **plain(max_new_tokens=3))
    assert len(said()) == 1, "neutral settings are neutral"


@pytest.mark.parametrize("name", [name for name in NEUTRAL if name in fields()])
def test_plain_settings_draw_what_plain_sampling_draws(name: str) -> None:
    """Token for token with the same random numbers, over a model whose own settings are others."""
    expected, found = ([row.tolist() for row in draw(name if departs else None)] for departs in (False, True))
    assert found == expected


def draw(name: str | None) -> list[torch.Tensor]:
    trainer = make_trainer()
    if name is not None:
        setattr(trainer.model.pretrained_model.generation_config, name, DEPARTING[name])
    torch.manual_seed(3)
    return trainer.generate(QUERIES, return_prompt=False, **plain(max_new_tokens=20))


def test_plain_settings_are_plain(said: Any) -> None:
    """What they draw is the softmax of the model's logits, token by token: a chi-squared test of the first token."""
    trainer = make_trainer()
    rows = trainer.generate([torch.tensor([5])] * 4000, batch_size=4000, return_prompt=False, **plain(max_new_tokens=1))
    drawn = torch.bincount(torch.cat(rows), minlength=99)
    with torch.no_grad():
        expected = 4000 * trainer.model.pretrained_model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    chi = ((drawn - expected) ** 2 / expected).sum()
    assert chi < 98 + 5 * (2 * 98) ** 0.5
    assert said() == []


def test_functions_that_move_the_distribution_are_named(said: Any) -> None:
    trainer = make_trainer()
    warper = TemperatureLogitsWarper(0.5)
    trainer.generate(QUERIES, logits_processor=LogitsProcessorList([warper]), **SAMPLED)
    trainer.generate(QUERIES, prefix_allowed_tokens_fn=lambda *_: [5, 6], **SAMPLED)
    assert "logits_processor=[TemperatureLogitsWarper]" in said()[0]
    assert "prefix_allowed_tokens_fn=" in said()[1]
    for message, name in zip(said(), ("logits_processor", "prefix_allowed_tokens_fn"), strict=True):
        assert message.endswith(f"sample without {name}"), "plain() changes nothing about it"
    make_trainer().generate(QUERIES, logits_processor=[], **SAMPLED)
    assert len(said()) == 2
    make_trainer().generate(QUERIES, logits_processor=[warper], temperature=0.5, **SAMPLED)
    assert (
        "sample with temperature=1.0 (ppo_runtime.rollout.sampling.plain() gives all such settings) and without logits_"
        in (said()[2])
    )


@pytest.mark.parametrize(
    "neutral",
    [
        {"top_k": 0.0, "top_p": 1.0, "min_length": -1},  # as old scripts have it
        {"temperature": 1, "repetition_penalty": 1, "guidance_scale": 1, "min_p": 0, "suppress_tokens": []},
        dict.fromkeys([name for name in NEUTRAL if name in fields()]),
    ],
    ids=["old", "whole numbers", "None"],
)
def test_neutral_settings_are_not_warned_about(neutral: dict[str, Any], said: Any) -> None:
    trainer = make_trainer()
    trainer.generate(QUERIES, **SAMPLED, **neutral)
    assert said() == []


def test_greedy_responses_are_said_when_they_are_trained_on(said: Any) -> None:
    """To look at a policy they are fine; and settings of sampling mean nothing to them."""
    trainer = make_trainer()
    queries, _, scores = make_batch()
    trainer.generate(queries, max_new_tokens=3, do_sample=False, temperature=0.5, return_prompt=False)
    sampled = trainer.generate(queries, max_new_tokens=3, do_sample=True, return_prompt=False)
    trainer.step(queries, sampled, scores)
    assert said() == []
    greedy = trainer.generate(queries, max_new_tokens=3, return_prompt=False)  # do_sample left out
    for _ in range(2):
        trainer.step(queries, greedy, scores)
    [message] = said()
    assert "do_sample=True" in message


@pytest.mark.parametrize("trained_on", ["sampled", "greedy"])
@pytest.mark.parametrize("last", ["sampled", "greedy"])
def test_what_was_generated_last_does_not_decide_what_is_said_of_a_step(trained_on: str, last: str, said: Any) -> None:
    """A look at the policy in between, the other way, is no matter."""
    trainer = make_trainer()
    queries, _, scores = make_batch()
    responses = {}
    for way in sorted(("sampled", "greedy"), key=last.__eq__):
        responses[way] = trainer.generate(
            queries, return_prompt=True, **plain(max_new_tokens=3, do_sample=way != "greedy")
        )
    own = [row[len(query) :] for query, row in zip(queries, responses[trained_on], strict=True)]
    trainer.step(queries, own, scores)
    assert ["do_sample=True" in message for message in said()] == [True] * (trained_on == "greedy")


@pytest.mark.parametrize("length", ["keyword", "generation_config"])
def test_the_loop_leaves_a_length_to_the_caller(length: str) -> None:
    """In whichever of the two ways it is said: max_length counts the prompt, of one token here."""
    trainer = make_trainer(dataset=Dataset.from_dict({"input_ids": [[5 + row] for row in range(6)]}))
    trainer.model.pretrained_model.generation_config.max_new_tokens = 30
    given = {"max_length": 5, "do_sample": True}
    lengths: list[int] = []

    def score(_: list[str], responses: list[str]) -> list[float]:
        lengths.extend(map(len, responses))
        return [1.0] * len(responses)

    options = given if length == "keyword" else {"generation_config": GenerationConfig(**given)}
    trainer.train(score, steps=1, generation_kwargs={**options, "eos_token_id": []})
    assert max(lengths) <= 4 * len("<eos>")
    assert trainer.generate(torch.tensor([5]), **options, eos_token_id=None).shape == (1, 5)


def test_the_loop_samples_plainly_whatever_the_model_says(said: Any) -> None:
    """And leaves to a caller what the caller sets, by keyword or in a generation config."""
    rows = Dataset.from_dict({"input_ids": [[5 + row] for row in range(6)]})
    seen: list[dict[str, Any]] = []

    def train(**generation_kwargs: Any) -> None:
        trainer = make_trainer(dataset=rows)
        own = trainer.model.pretrained_model.generation_config
        for name, value in DEPARTING.items():
            if name in fields():
                setattr(own, name, value)
        generate = trainer.generate

        def recording(queries: Any, **options: Any) -> Any:
            responses = generate(queries, **options)
            seen.append({"most": max(map(len, responses)), "options": options})
            return responses

        trainer.generate = recording  # a spy
        trainer.train(lambda _, responses: [1.0] * len(responses), steps=1, generation_kwargs=generation_kwargs)

    train()
    assert said() == []
    assert 3 < seen[-1]["most"] <= 32
    train(max_new_tokens=2, temperature=0.5)
    assert ["temperature=0.5" in message for message in said()] == [True]
    assert seen[-1]["most"] == 2
    train(generation_config=GenerationConfig(max_new_tokens=3, temperature=0.7))
    assert "temperature=0.7" in said()[-1]
    assert len(said()) == 2
    assert seen[-1]["most"] == 3


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of a run go to the working directory."""
    monkeypatch.chdir(tmp_path)
