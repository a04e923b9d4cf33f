"""Where responses end: every token of a response is the policy's choice, whatever it was that ended the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tests.runtime.support.tiny import EOS_ID, PAD_ID, VOCAB_SIZE
from tests.runtime.support.trainers import make_trainer

QUERIES = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 25]), torch.tensor([11]), torch.tensor([12, 13])] * 4
PLAIN = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
MOST = 12
ENDS = set(range(29, 49))  # capitals: no other token's text holds one


class EndsWith(StoppingCriteria):
    """Ends a row with any of these tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], torch.tensor(sorted(ENDS)))


def strings(trainer: Any) -> list[str]:
    return [trainer.tokenizer.decode([token]) for token in sorted(ENDS)]


# What ends a row with a token of ENDS, each by another door of transformers' generate.
DOORS: dict[str, Any] = {
    "eos_token_id": lambda trainer: PLAIN | {"eos_token_id": sorted(ENDS)},
    "eos_token_id as a tensor": lambda trainer: PLAIN | {"eos_token_id": torch.tensor(sorted(ENDS))},
    "generation_config": lambda trainer: {"generation_config": GenerationConfig(eos_token_id=sorted(ENDS), **PLAIN)},
    "stop_strings": lambda trainer: PLAIN | {"stop_strings": strings(trainer)},
    "stop_strings without EOS": lambda trainer: PLAIN | {"stop_strings": strings(trainer), "eos_token_id": None},
    "stop_strings and the tokenizer": lambda trainer: (
        PLAIN | {"stop_strings": strings(trainer), "tokenizer": trainer.tokenizer}
    ),
    "stop_strings in generation_config": lambda trainer: {
        "generation_config": GenerationConfig(stop_strings=strings(trainer), **PLAIN)
    },
    "stopping_criteria": lambda trainer: PLAIN | {"stopping_criteria": StoppingCriteriaList([EndsWith()])},
    "stopping_criteria, a list, without EOS": lambda trainer: (
        PLAIN | {"stopping_criteria": [EndsWith()], "eos_token_id": None}
    ),
    "one criterion": lambda trainer: PLAIN | {"stopping_criteria": EndsWith()},
    "the model's generation config, changed later": lambda trainer: PLAIN | model_ends(trainer),
}


def model_ends(trainer: Any) -> dict[str, Any]:
    trainer.model.pretrained_model.generation_config.eos_token_id = sorted(ENDS)
    return {}


def check_ends(responses: list[Tensor], ends: set[int], most: int = MOST) -> None:
    """Each response ends with the first token that ends a row, or is of full length."""
    for response in responses:
        assert not ends & set(response[:-1].tolist())
        assert int(response[-1]) in ends or len(response) == most
    lengths = {len(response) for response in responses}
    assert len(lengths) > 2, "the batch is ragged, or the test shows nothing"
    assert min(lengths) < most


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("pad_token_id", [PAD_ID, EOS_ID, 70], ids=["pad", "pad is EOS", "pad is a common token"])
@pytest.mark.parametrize("door", DOORS)
def test_a_response_ends_where_generation_ended_it(family: str, door: str, pad_token_id: int) -> None:
    """No padding, and nothing that was drawn for a row that had ended, however it ended."""
    trainer = make_trainer(family)
    responses = trainer.generate(
        QUERIES,
        batch_size=16,
        return_prompt=False,
        max_new_tokens=MOST,
        pad_token_id=pad_token_id,
        **DOORS[door](trainer),
    )
    criteria_besides_eos = "stop" in door or "criteri" in door
    eos = {EOS_ID} if criteria_besides_eos and "without" not in door else set()
    check_ends(responses, ENDS | eos)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("ending", ["eos_token_id", "stop_strings", "stopping_criteria"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beams_end_where_generation_ended_them(family: str, ending: str, do_sample: bool) -> None:
    """Beams are put in another order at every step; their lengths are those that beam search reports."""
    trainer = make_trainer(family)
    options = DOORS[ending](trainer) | {"num_beams": 3, "max_new_tokens": MOST, "return_prompt": False}
    options |= {"do_sample": do_sample}
    responses = trainer.generate(QUERIES[:4], batch_size=4, pad_token_id=PAD_ID, **options)
    ends = ENDS if ending == "eos_token_id" else ENDS | {EOS_ID}
    for response in responses:
        assert not ends & set(response[:-1].tolist())
        assert int(response[-1]) in ends or len(response) == MOST
    if not do_sample:
        for query, response in zip(QUERIES[:4], responses, strict=True):
            assert trainer.generate(query, pad_token_id=PAD_ID, **options)[0].tolist() == response.tolist()


def test_a_policy_may_sample_the_padding_token() -> None:
    """Padding is known by where a row ended, not by its id: a pad that was drawn is a token like any other."""
    trainer = make_trainer()
    options = PLAIN | {"max_new_tokens": 4, "return_prompt": False, "eos_token_id": EOS_ID}
    only = lambda *_: [EOS_ID, 70, 71]  # noqa: E731  of one line  three tokens, one of which pads
    responses = trainer.generate(QUERIES, batch_size=16, pad_token_id=70, prefix_allowed_tokens_fn=only, **options)
    check_ends(responses, {EOS_ID}, most=4)
    assert any(70 in response[:-1].tolist() for response in responses)
    assert any(int(response[-1]) == 70 for response in responses)


def test_no_eos_at_all_gives_full_responses() -> None:
    trainer = make_trainer()
    responses = trainer.generate(
        QUERIES, batch_size=16, return_prompt=False, max_new_tokens=60, eos_token_id=None, **PLAIN
    )
    assert [len(response) for response in responses] == [60] * len(QUERIES)
    assert any(EOS_ID in response[:-1].tolist() for response in responses)


def test_the_tokenizers_eos_ends_rows_of_a_model_without_one() -> None:
    """One EOS for generating and for cutting: a model that names none stops at the tokenizer's."""
    trainer = make_trainer()
    trainer.model.pretrained_model.generation_config.eos_token_id = None
    widths: list[int] = []
    generate = trainer.model.generate

    def recording(**kwargs: Any) -> Any:
        output = generate(**kwargs)
        widths.append(output.shape[1])
        return output

    trainer.model.generate = recording  # a spy
    only = lambda *_: [EOS_ID, 70]  # noqa: E731
    responses = trainer.generate(
        QUERIES[:2], return_prompt=False, max_new_tokens=50, prefix_allowed_tokens_fn=only, **PLAIN
    )
    assert all(int(response[-1]) == EOS_ID for response in responses)
    assert widths == [4 + max(map(len, responses))], "generation went on behind the EOS"


def test_several_batches_and_the_reference_have_lengths_of_their_own() -> None:
    trainer = make_trainer()
    policy, reference = trainer.generate(
        QUERIES,
        batch_size=3,
        return_prompt=False,
        generate_ref_response=True,
        max_new_tokens=MOST,
        stopping_criteria=[EndsWith()],
        **PLAIN,
    )
    check_ends(policy, ENDS | {EOS_ID})
    check_ends(reference, ENDS | {EOS_ID})


def test_what_generate_gives_is_what_step_takes() -> None:
    """The first ratio is 1 on responses of every kind of ending, and on those that the user cut."""
    for door, cut in (("stop_strings", MOST), ("stopping_criteria", MOST), ("generation_config", 3)):
        trainer = make_trainer(batch_size=16, mini_batch_size=4)
        responses = trainer.generate(
            QUERIES, batch_size=16, return_prompt=False, max_new_tokens=MOST, **DOORS[door](trainer)
        )
        stats = trainer.step(QUERIES, [response[:cut] for response in responses], [torch.tensor(1.0)] * 16)
        assert stats["ppo/policy/first_minibatch_ratio_deviation"] <= 1e-4
        assert stats["tokens/responses_dist"].tolist() == [min(len(response), cut) for response in responses]


def test_every_token_of_the_vocabulary_may_end_a_row() -> None:
    trainer = make_trainer()
    responses = trainer.generate(
        QUERIES, return_prompt=False, max_new_tokens=MOST, eos_token_id=list(range(VOCAB_SIZE)), **PLAIN
    )
    assert [len(response) for response in responses] == [1] * len(QUERIES)
