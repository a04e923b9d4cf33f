"""Whether an encoder-decoder's response begins with the decoder's start token: known where it can be, said if not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from ppo_runtime.models.context import decoder_start
from tests.runtime.support.tiny import BART_KIN, SEQ2SEQ_FAMILIES
from tests.runtime.support.trainers import make_batch, make_trainer

SAID = "begin with the decoder's start token"


def draw(trainer: Any, queries: list[Tensor], token: int) -> list[Tensor]:
    """Responses of the trainer's own ``generate``, all of which begin with that token."""

    class Chosen(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            wanted = torch.full_like(scores, -torch.inf)
            wanted[:, token if input_ids.shape[1] == 1 else 7] = 0.0
            return wanted

    return trainer.generate(
        queries, batch_size=2, max_new_tokens=3, do_sample=True, logits_processor=[Chosen()], eos_token_id=None
    )


def begun(trainer: Any, rows: list[Tensor]) -> list[Tensor]:
    start = torch.tensor([decoder_start(trainer.model)])
    return [torch.cat((start, row)) for row in rows]


def kept(trainer: Any, queries: list[Tensor], responses: list[Tensor], scores: list[Tensor]) -> list[list[int]]:
    """The responses as ``step`` takes them; the pieces take them alike."""
    masks = [torch.arange(len(response)) for response in responses]
    masks = [(mask != 1).long() for mask in masks]
    _, found, _, found_masks = trainer._check_step(queries, responses, scores, masks)
    assert found_masks is not None
    for one, mask, given, given_mask in zip(found, found_masks, responses, masks, strict=True):
        assert torch.equal(one, given[len(given) - len(one) :])
        assert mask.tolist() == given_mask[len(given) - len(one) :].bool().tolist()
    read = trainer.prepare_model_inputs(queries, responses)
    lengths = read["decoder_attention_mask"].sum(-1) - 1
    assert lengths.tolist() == [len(one) for one in found]
    *_, seen = trainer.batched_forward_pass(trainer.model, queries, responses, read, response_masks=masks)
    assert seen.sum(-1).tolist() == [int(mask.sum()) for mask in found_masks]
    return [row.tolist() for row in found]


@pytest.mark.parametrize("family", SEQ2SEQ_FAMILIES)
def test_a_start_token_that_the_policy_drew_is_its_choice(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where all of a batch did."""
    trainer = make_trainer(family)
    queries, _, scores = make_batch()
    responses = draw(trainer, queries, decoder_start(trainer.model))
    assert all(len(row) == 3 and int(row[0]) == decoder_start(trainer.model) for row in responses)
    assert kept(trainer, queries, responses, scores) == [row.tolist() for row in responses]
    # In another order, and with the start token in front.
    assert kept(trainer, queries, begun(trainer, responses[::-1]), scores) == [row.tolist() for row in responses[::-1]]
    assert SAID not in caplog.text


@pytest.mark.parametrize("family", ["t5", *BART_KIN])
def test_a_response_that_nobody_knows_is_guessed_at_and_that_is_said_once(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(family)
    queries, responses, scores = make_batch()
    for _ in range(2):
        found = kept(trainer, queries, begun(trainer, responses), scores)
        assert found == [row.tolist() for row in responses]
    (said,) = [message for message in caplog.messages if SAID in message]
    assert str(decoder_start(trainer.model)) in said
    assert "trainer.generate" in said


def test_known_responses_do_not_vote_on_others(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer("t5")
    queries, responses, scores = make_batch()
    drawn = draw(trainer, queries, 9)
    mixed = drawn[:3] + begun(trainer, responses[3:])
    assert kept(trainer, queries, mixed, scores) == [row.tolist() for row in drawn[:3] + responses[3:]]
    assert caplog.text.count(SAID) == 1
    mixed = begun(trainer, drawn[:3]) + responses[3:]
    assert kept(trainer, queries, mixed, scores) == [row.tolist() for row in drawn[:3] + responses[3:]]


def test_one_response_without_it_means_that_the_others_drew_it(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer("t5")
    queries, responses, scores = make_batch()
    mixed = begun(trainer, responses[:-1]) + responses[-1:]
    assert kept(trainer, queries, mixed, scores) == [row.tolist() for row in mixed]
    assert SAID not in caplog.text


@pytest.mark.parametrize("change", ["another token in front", "two tokens fewer"])
def test_inputs_that_do_not_hold_the_response_are_still_refused(change: str) -> None:
    trainer = make_trainer("t5")
    queries, responses, _ = make_batch()
    responses = [torch.cat((response, response)) for response in responses]
    read = trainer.prepare_model_inputs(queries, responses)
    start = torch.tensor([decoder_start(trainer.model)])
    front = {"another token in front": torch.tensor([5]), "two tokens fewer": torch.cat((start, start))}[change]
    with pytest.raises(ValueError, match="make it with prepare_model_inputs"):
        trainer.batched_forward_pass(
            trainer.model, queries, [torch.cat((front, response)) for response in responses], read
        )


def test_a_causal_model_has_no_start_token(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer("llama")
    queries, responses, scores = make_batch()
    led = [torch.cat((torch.tensor([1]), response)) for response in responses]
    _, found, _, _ = trainer._check_step(queries, led, scores, None)
    assert [row.tolist() for row in found] == [row.tolist() for row in led]
    assert SAID not in caplog.text
