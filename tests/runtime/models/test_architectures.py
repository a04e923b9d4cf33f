"""Every supported family, tiny and random: generate, step, save, load, and no trace of padding in any number."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from ppo_runtime import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.learning.forward import evaluate, lay_out
from ppo_runtime.models.context import Context, decoder_start
from ppo_runtime.models.modes import dropout_off
from tests.runtime.support.tiny import (
    ALL_FAMILIES,
    EOS_ID,
    PAD_ID,
    SEQ2SEQ_FAMILIES,
    T5_KIN,
    VOCAB_SIZE,
    tiny_model,
    tiny_tokenizer,
)
from tests.runtime.support.trainers import make_batch, make_trainer

families = pytest.mark.parametrize("family", ALL_FAMILIES)
encoder_decoders = pytest.mark.parametrize("family", SEQ2SEQ_FAMILIES)
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 5}


def wrapper(family: str) -> Any:
    return AutoModelForSeq2SeqLMWithValueHead if family in SEQ2SEQ_FAMILIES else AutoModelForCausalLMWithValueHead


def evaluated(model: Any, queries: list[Tensor], responses: list[Tensor], **widths: int) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies and values of a batch in one pass, padded together."""
    start = decoder_start(model) if model.config.is_encoder_decoder else None
    rows = lay_out(
        queries,
        responses,
        None,
        pad_token_id=PAD_ID,
        decoder_start_token_id=start,
        device=torch.device("cpu"),
        **widths,
    )
    with torch.no_grad(), dropout_off(model):
        result = evaluate(model, rows)
    assert result.values is not None
    return result.logprobs, result.entropy, result.values


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("said", [None, -1, 0])
def test_a_limit_below_one_is_no_limit(said: int | None) -> None:
    """XLNet's configuration has -1 where others have the length of their context."""
    config = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=said)
    context = Context.of(SimpleNamespace(config=config))
    assert context == Context()
    context.check([5], [1], names=("queries", "responses"), response="response")
    assert Context.of(SimpleNamespace(config=SimpleNamespace(**vars(config) | {"max_position_embeddings": 1}))).row == 1


@families
def test_generate_step_save_load(family: str, tmp_path: Path) -> None:
    """One round of everything; what was saved loads with the same numbers, here and in plain transformers."""
    trainer = make_trainer(family, learning_rate=1e-2)
    queries, _, scores = make_batch()
    responses = trainer.generate(queries, batch_size=3, return_prompt=False, **SAMPLING)
    assert all(1 <= len(response) <= 5 for response in responses)
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/policy/first_minibatch_ratio_deviation"] <= 1e-4
    assert stats["ppo/policy/approxkl"] > 1e-6
    trainer.save_pretrained(tmp_path)

    expected = evaluated(trainer.model, queries, responses)
    for a, b in zip(evaluated(wrapper(family).from_pretrained(tmp_path), queries, responses), expected, strict=True):
        assert torch.equal(a, b)
    plain = wrapper(family).transformers_parent_class.from_pretrained(tmp_path)
    for (name, a), b in zip(
        plain.state_dict().items(), trainer.model.pretrained_model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    tokens = {"input_ids": queries[0][None]} | (
        {"decoder_input_ids": responses[0][None]} if family in SEQ2SEQ_FAMILIES else {}
    )
    with torch.no_grad(), dropout_off(trainer.model):
        assert_close(plain(**tokens).logits, trainer.model(**tokens)[0])


@families
def test_a_row_does_not_know_its_neighbours(family: str) -> None:
    """Log-probabilities, entropies and values alone, in a batch, and in a batch padded far beyond its longest row."""
    model = wrapper(family).from_pretrained(tiny_model(family))
    torch.nn.init.normal_(model.v_head.summary.weight)
    queries, responses, _ = make_batch()
    together = evaluated(model, queries, responses)
    wider = evaluated(model, queries, responses, input_width=30, response_width=20)
    time = together[0].shape[1]
    assert_close(tuple(x[:, :time] for x in wider), together)
    for row in range(len(queries)):
        alone = evaluated(model, queries[row : row + 1], responses[row : row + 1])
        length = len(responses[row])
        assert_close(tuple(x[0] for x in alone), tuple(x[row, :length] for x in together))


@families
def test_logprobs_are_those_of_the_models_own_logits(family: str) -> None:
    """Against the whole forward of transformers, one unpadded row at a time."""
    model = wrapper(family).from_pretrained(tiny_model(family))
    queries, responses, _ = make_batch()
    logprobs, _, seen = evaluated(model, queries, responses)
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        if family in SEQ2SEQ_FAMILIES:
            start = torch.tensor([decoder_start(model)])
            decoder = torch.cat((start, response[:-1]))
            logits, _, values = model(query[None], decoder_input_ids=decoder[None])
            logits, values = logits[0], values[0]
        else:
            logits, _, values = model(torch.cat((query, response))[None])
            logits, values = logits[0, len(query) - 1 : -1], values[0, len(query) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        assert_close(logprobs[row, : len(response)], expected)
        assert_close(seen[row, : len(response)], values)


@families
def test_padding_with_eos_changes_nothing(family: str) -> None:
    """Masks come from lengths; the EOS inside prompts and at the end of responses stays a token."""
    queries, responses, scores = make_batch()
    queries[0][0] = EOS_ID
    responses = [torch.cat((response, torch.tensor([EOS_ID]))) for response in responses]
    trainers = [make_trainer(family), make_trainer(family)]
    trainers[1].pad_token_id = EOS_ID
    for trainer in trainers:
        trainer.step(queries, responses, scores)
    for (name, a), b in zip(trainers[0].model.named_parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@families
def test_greedy_generation_does_not_know_its_batch(family: str) -> None:
    """Padding (the prompts differ in length) leaves greedy responses as they are one by one."""
    trainer = make_trainer(family)
    queries = [torch.tensor([5, 6, 7, 8, 9, 10, 11]), torch.tensor([30, 31]), torch.tensor([12])]
    options = {"return_prompt": False, "max_new_tokens": 8, "do_sample": False}
    together = trainer.generate(queries, batch_size=3, **options)
    for query, response in zip(queries, together, strict=True):
        assert trainer.generate(query, **options)[0].tolist() == response.tolist()
        assert trainer.generate([query], batch_size=1, pad_token_id=EOS_ID, **options)[0].tolist() == response.tolist()


@families
def test_several_eos_ids(family: str) -> None:
    """A response ends with the first of them that is drawn, and holds none before."""
    trainer = make_trainer(family)
    ends = {EOS_ID, *range(20, 50)}
    trainer.model.pretrained_model.generation_config.eos_token_id = sorted(ends)
    trainer.eos_token_ids = ends
    queries = [torch.tensor([5, 25, 6]), torch.tensor([7])] * 3
    responses = trainer.generate(queries, batch_size=6, return_prompt=False, **SAMPLING)
    for response in responses:
        assert not ends & set(response[:-1].tolist())
        assert int(response[-1]) in ends or len(response) == 5
    assert any(len(response) < 5 for response in responses)
    explicit = trainer.generate(
        queries, batch_size=6, return_prompt=False, eos_token_id=list(range(VOCAB_SIZE)), **SAMPLING
    )
    assert [len(response) for response in explicit] == [1] * 6


@encoder_decoders
def test_shared_layers_stay_and_the_others_train(family: str) -> None:
    """The embeddings and the bottom of both stacks are the reference's own tensors; what lies above them moves."""
    trainer = make_trainer(family, num_shared_layers=1, learning_rate=1e-2)
    policy = dict(trainer.model.named_parameters())
    reference = dict(trainer.ref_model.named_parameters())
    shared = {name for name in policy if name in reference and policy[name] is reference[name]}
    layers = {match[0] for name in shared if (match := re.search(r"(en|de)coder\.(block|layers)\.\d+", name))}
    stack = "block" if family in T5_KIN else "layers"
    assert layers == {f"encoder.{stack}.0", f"decoder.{stack}.0"}
    assert any("shared" in name for name in shared)
    before = {name: parameter.detach().clone() for name, parameter in policy.items()}
    stats = trainer.step(*make_batch())
    assert stats["ppo/policy/first_minibatch_ratio_deviation"] <= 1e-4
    for name, parameter in policy.items():
        if "_global." not in name:  # LED's, for global attention, which nothing here asks for
            assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    assert shared == {name for name, parameter in policy.items() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("family", "prompt", "response"), [("bart", 64, 64), ("marian", 64, 64), ("led", 64, 32), ("t5", None, None)]
)
def test_an_encoder_decoder_has_room_for_a_prompt_and_for_a_response(
    family: str, prompt: int | None, response: int | None
) -> None:
    """A prompt counts against the encoder's positions, a response against the decoder's; relative ones never end."""
    trainer = make_trainer(family, batch_size=1, mini_batch_size=1, ppo_epochs=1)
    query, answer, score = torch.full((prompt or 70,), 5), torch.full((response or 70,), 6), torch.tensor(1.0)
    trainer.generate(query, max_new_tokens=len(answer), do_sample=True, top_k=0, eos_token_id=None)
    trainer.step([query], [answer], [score])
    for too_long, part in (((query.repeat(2), answer), "encoder"), ((query, answer.repeat(2)), "decoder")):
        if prompt is None:
            trainer.step([too_long[0]], [too_long[1]], [score])
            continue
        message = rf"\[0\]: .* is \d+ tokens, but the model's {part}'s context is \d+"
        with pytest.raises(ValueError, match=message):
            trainer.step([too_long[0]], [too_long[1]], [score])
        with pytest.raises(ValueError, match=message):
            trainer.generate(too_long[0], max_new_tokens=len(too_long[1]))


def test_the_loop_gives_prompts_and_responses_room_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt as long as the encoder has positions, and a response as long as the decoder has."""
    monkeypatch.chdir(tmp_path)  # for the metrics
    rows = Dataset.from_dict({"input_ids": [[5] * 64, [6] * 50]})
    trainer = make_trainer("bart", dataset=rows, batch_size=2, mini_batch_size=1, ppo_epochs=1)
    result = trainer.train(
        lambda _, responses: [1.0] * len(responses),
        steps=1,
        generation_kwargs={"max_new_tokens": 64, "eos_token_id": None},
    )
    assert result.history[0]["tokens/responses_len_mean"] == 64


def test_the_decoder_begins_with_the_start_token_or_with_bos() -> None:
    """What generation puts in front of a response is what the step scores it behind."""
    model = tiny_model("mbart")
    assert model.config.decoder_start_token_id is None
    assert decoder_start(model) == EOS_ID  # its BOS
    assert model.generation_config is not None
    model.generation_config.decoder_start_token_id = 7
    assert decoder_start(model) == 7
    trainer = PPOTrainer(
        PPOConfig(batch_size=1, accel="eager"), wrapper("mbart").from_pretrained(model), None, tiny_tokenizer()
    )
    response = trainer.generate(torch.tensor([5, 6]), max_new_tokens=1, do_sample=False)[0]
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[7]])).logits
    assert response.tolist() == [int(logits[0, 0].argmax())]
    assert trainer.prepare_model_inputs([torch.tensor([5])], [torch.tensor([8, 9])])["decoder_input_ids"][0, 0] == 7

    model.generation_config.decoder_start_token_id = [7, 8]
    with pytest.raises(ValueError, match=r"decoder_start_token_id of .* is \[7, 8\], expected one token id"):
        trainer.generate(torch.tensor([5, 6]), max_new_tokens=1)
    for config in (model.generation_config, model.config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(ValueError, match="names neither decoder_start_token_id nor bos_token_id"):
        trainer.generate(torch.tensor([5, 6]), max_new_tokens=1)


def test_the_trainer_takes_the_models_list_of_eos_ids() -> None:
    model = tiny_model("llama")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [EOS_ID, 40]
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    trainer = PPOTrainer(PPOConfig(batch_size=1, accel="eager"), wrapped, None, tiny_tokenizer())
    assert trainer.eos_token_ids == {EOS_ID, 40}
