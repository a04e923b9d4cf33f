"""What `generate` is given: every bad value is answered by its argument's name before anything is generated."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from ppo_runtime import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer, respond_to_batch
from ppo_runtime.rollout.settings import fields
from ppo_runtime.rollout.values import FLAGS, KINDS, NUMBERS, REFUSED
from tests.runtime.support.tiny import EOS_ID, PAD_ID, VOCAB_SIZE, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8])]
NAN, INF = float("nan"), float("inf")
EMPTY = torch.tensor([], dtype=torch.long)

# Values of which none can be any number, id or object of transformers; each argument's own limits are further down.
NONSENSE: tuple[Any, ...] = (object(), "text", [[]], [None], {"a": 1}, torch.tensor([[1.5, 2.5]]))
REFUSALS: dict[str, list[Any]] = {
    "query_tensor": [
        *(
            None,
            [],
            (),
            "text",
            5,
            5.0,
            {},
            {5, 6},
            range(3),
            iter([1]),
            [None],
            [5, None],
            [[5], None],
            ["a"],
            [["a"]],
        ),
        *(torch.tensor(5), torch.tensor([[5, 6]]), torch.tensor([5.0]), torch.tensor([True]), EMPTY, [EMPTY], [[]]),
        *([torch.tensor([[5]])], [torch.tensor(5)], [torch.tensor([-1])], [torch.tensor([VOCAB_SIZE])], [[2**70]]),
        *(torch.tensor([]), [torch.tensor([])], np.array([])),
        *(torch.tensor([5], dtype=torch.int16), [5.5], [[5.5]], [[True]], np.array([5.0]), np.array([[5, 6]])),
        *({"input_ids": [5]}, [-1], [VOCAB_SIZE]),
    ],
    "length_sampler": [
        5,
        "text",
        *(lambda value=v: value for v in (0, -1, 2.5, 2.0, NAN, None, True, "3", 62, 10**12)),
    ],
    "batch_size": [0, -1, True, 1.5, "4", NAN, [4], 2.0],
    "return_prompt": [None, "no", 0, 1],
    "generate_ref_response": [None, "no", 0, 1],
    "max_new_tokens": [0, -1, "5", 2.5, 5.0, True, NAN, INF, [5], 10**12, 62],
    "max_length": [0, -1, "5", 2.5, True, 3, 65],
    "num_beams": [0, -1, "2", 1.5, True],
    "num_return_sequences": [0, 2, "2", True],
    "return_dict_in_generate": [True],
    "output_scores": [True],
    "prompt_lookup_num_tokens": [2],
    "assistant_model": [tiny_model("gpt2")],
    "custom_generate": ["a/repository", lambda *_, **__: None],
    "token_healing": [True],
    "force_words_ids": [[[5]]],
    "temperature": [0, 0.0, -1, NAN, INF, "hot", True, 1e-320, 1e-40, 1e39],
    "top_k": [-1, 2.5, NAN, True],
    "top_p": [0, -0.1, 1.1, NAN, True, 10**400],
    "min_p": [-0.1, 1.1],
    "typical_p": [0, 2],
    "repetition_penalty": [0, -1, INF, 1e-320, 1e-40, 1e39],
    "encoder_repetition_penalty": [1e-40, 1e39],
    "guidance_scale": [NAN, INF, 1e39, -1e39],
    "sequence_bias": [
        *({(5,): INF}, {(5,): NAN}, {(5,): 1e39}, {(5,): 1}, {5: 1.0}, {(): 1.0}, {(-1,): 1.0}, {(VOCAB_SIZE,): 1.0}),
        *([[[5], INF]], [[(5,), 1.0]], [[5, 1.0]], [[[], 1.0]], [[[5, VOCAB_SIZE], 1.0]]),
        {(token,): -INF for token in range(VOCAB_SIZE)},
    ],
    "bad_words_ids": [[[VOCAB_SIZE]], [[5, VOCAB_SIZE]]],
    "min_length": [2.5, NAN, True],
    "min_new_tokens": [2.5, NAN, True],
    "no_repeat_ngram_size": [-1, 1.5],
    "eos_token_id": [1.5, "</s>", [1.5], [[1]], True, {}],
    "pad_token_id": [VOCAB_SIZE, -1, 1.5, "<pad>", True, [1]],
    "decoder_start_token_id": [[1], 1.5],
    "stop_strings": ["", [""], 5, ["a", 5], [["a"]], "\N{SNOWMAN}"],
    "stopping_criteria": [5, [5]],
    "logits_processor": [5, [5]],
    "prefix_allowed_tokens_fn": [5, [5]],
    "generation_config": [{}, {"max_new_tokens": 2}, "text", 5],
    "max_new_token": [5],  # a slip of the pen
    "input_ids": [QUERIES[0]],
    "attention_mask": [torch.ones(1, 3)],
    "decoder_input_ids": [QUERIES[0]],
    "past_key_values": [5],
    "synced_gpus": [True, "yes"],
    "forced_eos_token_id": [VOCAB_SIZE, [5, VOCAB_SIZE]],
    "forced_bos_token_id": [VOCAB_SIZE],
    "suppress_tokens": [list(range(VOCAB_SIZE))],
    "begin_suppress_tokens": [list(range(VOCAB_SIZE))],
}
TENSORS = ("negative_prompt_ids", "negative_prompt_attention_mask")
for argument in (*NUMBERS, *FLAGS, *KINDS, *REFUSED):
    fitting = {"stop_strings": "text", "bad_words_ids": [], "cache_config": {"a": 1}}
    REFUSALS.setdefault(argument, []).extend(
        value
        for value in NONSENSE
        if not (isinstance(value, str | dict) and value == fitting.get(argument))
        and not (isinstance(value, torch.Tensor) and argument in TENSORS)
    )
CASES = [(name, i) for name, values in REFUSALS.items() for i in range(len(values))]

# Accepted on purpose, and what is then returned: the lengths of the responses, None where they are up to chance.
ACCEPTED: dict[str, tuple[dict[str, Any], list[int] | None]] = {
    "rows of ints": ({"query_tensor": [[5, 6, 7], [8]]}, None),
    "tuples": ({"query_tensor": ((5, 6, 7), (8,))}, None),
    "arrays": ({"query_tensor": [np.array([5, 6, 7]), np.array([8], dtype=np.int32)]}, None),
    "int32": ({"query_tensor": [torch.tensor([5], dtype=torch.int32)]}, None),
    "more rows at a time than there are": ({"batch_size": 10**9}, None),
    "as many rows at a time as memory holds": ({"batch_size": None}, None),
    "a numpy batch size": ({"batch_size": np.int64(1)}, None),
    "a numpy length": ({"max_new_tokens": np.int64(2), "eos_token_id": None}, [2, 2]),
    "a tensor for a length": ({"max_new_tokens": torch.tensor(2), "eos_token_id": None}, [2, 2]),
    "a sampler of numpy's": ({"length_sampler": lambda: np.int64(3), "eos_token_id": None}, [3, 3]),
    "a sampler over max_new_tokens": ({"length_sampler": lambda: 3, "max_new_tokens": 9, "eos_token_id": None}, [3, 3]),
    "transformers' own length": ({"max_new_tokens": None, "eos_token_id": None}, [20, 20]),
    "a length with the prompt": ({"max_new_tokens": None, "max_length": 5, "eos_token_id": None}, [2, 2]),
    "a length with the prompt, in a config": (
        {"generation_config": GenerationConfig(max_length=5, do_sample=True), "eos_token_id": None},
        [2, 2],
    ),
    "a least length, negative": ({"min_length": -1, "eos_token_id": None}, [4, 4]),
    "no length with the prompt": ({"max_length": None, "max_new_tokens": 4, "eos_token_id": None}, [4, 4]),
    "no EOS": ({"eos_token_id": None}, [4, 4]),
    "an empty list of EOS": ({"eos_token_id": []}, [4, 4]),
    "old scripts' EOS that is never drawn": ({"eos_token_id": 100_000}, [4, 4]),
    "old scripts' EOS below 0": ({"eos_token_id": -1}, [4, 4]),
    "a set of EOS": ({"eos_token_id": set(range(VOCAB_SIZE))}, [1, 1]),
    "a tensor of EOS": ({"eos_token_id": torch.arange(VOCAB_SIZE)}, [1, 1]),
    "the trainer's padding": ({"pad_token_id": None}, None),
    "no stop strings": ({"stop_strings": [], "eos_token_id": None}, [4, 4]),
    "no criteria": ({"stopping_criteria": [], "logits_processor": None}, None),
    "no beams": ({"num_beams": None, "num_return_sequences": None, "do_sample": None}, None),
    "neutral refused ones": (
        {"num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False, "attention_mask": None},
        None,
    ),
    "the least temperature": ({"temperature": 1e-30}, None),
    "the highest temperature": ({"temperature": 1e30, "suppress_tokens": [5]}, None),
    "a penalty of little": ({"repetition_penalty": 1e-30}, None),
    "a bias that forbids": ({"sequence_bias": {(5,): -INF, (6, 7): -INF, (8,): 2.0}}, None),
    "a list of biases": ({"sequence_bias": [[[5], -INF], [[6, 7], 1.5]]}, None),
    "a whole temperature": ({"temperature": 2, "repetition_penalty": 2}, None),
    "numpy numbers": ({"temperature": np.float32(0.5), "top_k": np.int64(5)}, None),
    "one logits processor": ({"logits_processor": lambda ids, scores: scores, "eos_token_id": None}, [4, 4]),
    "a decoder's start where there is none": ({"decoder_start_token_id": 5}, None),
}


class Spied(Exception):
    """Something was generated."""


def refuse_to_generate(**_: Any) -> Any:
    raise Spied


def call(trainer: Any, **options: Any) -> Any:
    lengths = {"max_new_tokens", "max_length", "length_sampler", "generation_config"} & options.keys()
    defaults = {"do_sample": True, "query_tensor": QUERIES} | ({} if lengths else {"max_new_tokens": 4})
    return trainer.generate(**(defaults | options))


@pytest.fixture(scope="module")
def trainers() -> dict[str, PPOTrainer]:
    return {family: make_trainer(family) for family in ("llama", "t5")}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_bad_value_is_named_before_anything_is_generated(
    name: str, index: int, trainers: dict[str, PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, value = trainers["llama"], REFUSALS[name][index]
    monkeypatch.setattr(trainer.model, "generate", refuse_to_generate)
    with pytest.raises(ValueError, match=name.replace("max_length", "max_(length|new_tokens)")) as refused:
        call(trainer, **{name: value})
    assert "expected" in str(refused.value) or "context" in str(refused.value) or "did you mean" in str(refused.value)


@pytest.mark.parametrize("name", [name for name in REFUSALS if name in fields()])
def test_a_bad_value_is_named_in_a_generation_config_as_well(
    name: str, trainers: dict[str, PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table by the other door."""
    trainer = trainers["llama"]
    monkeypatch.setattr(trainer.model, "generate", refuse_to_generate)
    for value in REFUSALS[name]:
        config = GenerationConfig(do_sample=True)
        setattr(config, name, value)  # past its own checks
        with pytest.raises(ValueError, match=name):
            trainer.generate(QUERIES, generation_config=config)


# Newer releases of transformers advise against their own default.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted_on_purpose(case: str, trainers: dict[str, PPOTrainer]) -> None:
    options, lengths = ACCEPTED[case]
    responses = call(trainers["llama"], return_prompt=False, **options)
    found = [len(response) for response in responses]
    assert all(1 <= length <= 20 for length in found)
    assert lengths is None or found == lengths


@pytest.mark.parametrize("name", REFUSED)
def test_every_refused_setting_may_be_neutral(name: str, trainers: dict[str, PPOTrainer]) -> None:
    """Whether or not the installed transformers knows it."""
    for value in (None, *REFUSED[name][0]):
        assert len(call(trainers["llama"], max_new_tokens=1, **{name: value})) == 2


@pytest.mark.parametrize("door", ["keyword", "generation_config"])
@pytest.mark.parametrize("name", ["length", "least length"])
def test_what_the_caller_says_wins_over_what_the_models_own_config_says_otherwise(name: str, door: str) -> None:
    """max_length and max_new_tokens say one thing in two ways, and so do min_length and min_new_tokens."""
    trainer = make_trainer()
    own = trainer.model.pretrained_model.generation_config
    if name == "length":
        own.max_new_tokens, asked, ends = 30, {"max_length": 5}, None
    else:
        own.min_new_tokens, asked, ends = 3, {"min_length": 8, "max_new_tokens": 9}, list(range(1, VOCAB_SIZE))
    asked |= {"do_sample": True}
    options = asked if door == "keyword" else {"generation_config": GenerationConfig(**asked)}
    [row] = trainer.generate(torch.tensor([5, 6, 7]), eos_token_id=ends, **options)
    # Nearly every token ends the response, so it is as long as it must be.
    assert len(row) == 5 if name == "length" else len(row) >= 8


@pytest.mark.parametrize("door", ["keyword", "generation_config"])
def test_transformers_is_told_one_length_in_one_way(
    door: str, trainers: dict[str, PPOTrainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would warn, with every batch, of two that the caller has not given."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    asked: dict[str, Any] = {"max_length": 12, "min_length": 11, "num_beams": 2}
    options = asked if door == "keyword" else {"generation_config": GenerationConfig(**asked)}
    queries = [torch.tensor([3, 4, 5]), torch.tensor([3, 4, 5, 6, 7, 8, 9])]
    trainers["llama"].generate(queries, batch_size=1, **options)
    assert "seem to have been set" not in caplog.text


@pytest.mark.parametrize("named", [{"guidance_scale": 1.5}, {"prefill_chunk_size": 2}])
def test_what_only_decoders_can_do_is_refused_for_an_encoder_decoder(
    named: dict[str, Any], trainers: dict[str, PPOTrainer]
) -> None:
    [name] = named
    with pytest.raises(ValueError, match=f"{name} is .*, expected to be left out"):
        call(trainers["t5"], **named)
    # The model's own is nobody's mistake, and has no effect.
    drawn = []
    for own in (None, named[name]):
        trainer = make_trainer("t5")
        setattr(trainer.model.pretrained_model.generation_config, name, own)
        torch.manual_seed(3)
        drawn.append([row.tolist() for row in call(trainer)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "verdict", [None, [True, False], 1, "no", torch.tensor([1, 0]), torch.tensor([True] * 3)], ids=repr
)
def test_a_stopping_criterion_says_true_or_false_of_each_row(verdict: Any, trainers: dict[str, PPOTrainer]) -> None:
    def judge(*_: Any, **__: Any) -> Any:
        return verdict

    with pytest.raises(ValueError, match=r"stopping_criteria: judge returned .*, expected a boolean tensor \(2,\)"):
        call(trainers["llama"], stopping_criteria=[judge])


def test_a_stopping_criterion_may_judge_all_rows_at_once(trainers: dict[str, PPOTrainer]) -> None:
    for verdict in (True, torch.tensor(True), torch.tensor([True])):
        rows = call(trainers["llama"], return_prompt=False, stopping_criteria=[lambda *_, v=verdict, **__: v])
        assert [len(row) for row in rows] == [1, 1]


def test_every_argument_is_in_the_table() -> None:
    arguments = inspect.signature(PPOTrainer.generate).parameters.keys() - {"self", "generation_kwargs"}
    assert arguments <= REFUSALS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.long, torch.bool])
def test_an_empty_row_is_called_empty_whatever_its_dtype(dtype: torch.dtype, trainers: dict[str, PPOTrainer]) -> None:
    """torch.tensor([]) is a float tensor; that it holds no tokens is what its owner has to hear."""
    empty = torch.tensor([], dtype=dtype)
    for queries in (empty, [torch.tensor([5]), empty]):
        with pytest.raises(ValueError, match="is empty, expected at least one token; start the prompt with a BOS"):
            call(trainers["llama"], query_tensor=queries)
    queries, responses, scores = make_batch()
    with pytest.raises(ValueError, match=r"responses\[1\] is empty, .* still answers with its EOS"):
        trainers["llama"].step(queries, [responses[0], empty, *responses[2:]], scores)


def test_one_query_is_one_query_in_every_form(trainers: dict[str, PPOTrainer]) -> None:
    for query in (torch.tensor([5, 6]), [5, 6], (5, 6), np.array([5, 6])):
        [row] = trainers["llama"].generate(query, max_new_tokens=2, do_sample=True)
        assert isinstance(row, torch.Tensor)
        assert row[:2].tolist() == [5, 6]


def test_every_length_is_checked_against_the_context_before_the_first_batch(
    trainers: dict[str, PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the batch that it is for, by the row's own number."""
    trainer = trainers["llama"]
    monkeypatch.setattr(trainer.model, "generate", refuse_to_generate)
    queries = [torch.full((length,), 5) for length in (3, 50, 4, 60)]
    lengths = iter([10, 5])
    with pytest.raises(
        ValueError, match=r"query_tensor\[3\]: prompt \+ length_sampler's length is 65 tokens, .* context is 64"
    ):
        call(trainer, query_tensor=queries, batch_size=2, length_sampler=lambda: next(lengths))
    with pytest.raises(ValueError, match=r"query_tensor\[1\]: prompt \+ length_sampler's length is 65"):
        call(trainer, query_tensor=queries, batch_size=2, length_sampler=lambda: 15)
    # The reference's lengths are drawn as well, after the policy's.
    lengths = iter([1, 2, 3, 50])
    with pytest.raises(ValueError, match=r"query_tensor\[3\]"):
        call(
            trainer,
            query_tensor=queries,
            batch_size=2,
            length_sampler=lambda: next(lengths),
            generate_ref_response=True,
        )
    with pytest.raises(ValueError, match=r"query_tensor\[0\]: length_sampler's length .* decoder's context is 32"):
        call(make_trainer("led"), query_tensor=[5], length_sampler=LengthSampler(33, 34))


def test_what_the_models_own_config_asks_for_is_overruled() -> None:
    """A model may ship settings that the trainer does not do; nobody asked for them here."""
    trainer = make_trainer()
    own = trainer.model.pretrained_model.generation_config
    own.do_sample = True
    own.num_return_sequences, own.return_dict_in_generate, own.output_scores, own.token_healing = 3, True, True, True
    before = copy.deepcopy(own.to_dict())
    assert len(call(trainer, return_prompt=False)) == 2
    own.do_sample = False
    before = copy.deepcopy(own.to_dict())
    assert len(call(trainer, return_prompt=False)) == 2
    config = GenerationConfig(do_sample=True, max_new_tokens=2)
    assert len(call(trainer, generation_config=config, eos_token_id=None)) == 2
    assert trainer.model.pretrained_model.generation_config is own
    assert own.to_dict() == before
    assert config.eos_token_id is None


def test_an_encoder_decoder_begins_with_its_own_token_only(trainers: dict[str, PPOTrainer]) -> None:
    call(trainers["t5"], decoder_start_token_id=PAD_ID)
    with pytest.raises(ValueError, match=f"decoder_start_token_id is {EOS_ID}, expected {PAD_ID} like that of"):
        call(trainers["t5"], decoder_start_token_id=EOS_ID)


def test_a_padding_token_that_the_model_has_no_embedding_for_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(ValueError, match=rf"pad_token_id is {VOCAB_SIZE}, expected .* {VOCAB_SIZE}\).*resize_token"):
        make_trainer(tokenizer=tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    model.pretrained_model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=rf"eos_token_id, which pads .* is {VOCAB_SIZE}, expected a token id"):
        PPOTrainer(PPOConfig(**SETTINGS), model, None, tokenizer)
    model.pretrained_model.generation_config.eos_token_id = [VOCAB_SIZE, EOS_ID]
    trainer = PPOTrainer(PPOConfig(**SETTINGS), model, None, tokenizer)
    assert trainer.pad_token_id == EOS_ID


def test_settings_reach_a_model_inside_peft() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=tiny_lora("llama"))
    trainer = PPOTrainer(PPOConfig(**SETTINGS), model, None, tiny_tokenizer())
    options = {"return_prompt": False, "generate_ref_response": True}
    config = GenerationConfig(eos_token_id=list(range(VOCAB_SIZE)), do_sample=True, max_new_tokens=4)
    for answers in (call(trainer, generation_config=config, **options), call(trainer, stop_strings=["a"], **options)):
        policy, reference = answers
        assert len(policy) == len(reference) == 2
    with pytest.raises(ValueError, match=r"max_new_token=5 is no setting .* did you mean max_new_tokens"):
        call(trainer, max_new_token=5)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.5, 3), "min_value is 1.5, expected a whole number from 0"),
        ((1, "3"), "max_value is '3', expected a whole number from 0"),
        ((-1, 3), "min_value is -1, expected a whole number from 0"),
        ((True, 3), "min_value is True, expected a whole number from 0"),
        ((3, 3), "max_value is 3, expected more than min_value = 3"),
    ],
)
def test_a_length_samplers_bounds_are_named(bounds: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthSampler(*bounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": [[5]]}, "queries is list, expected a tensor of token ids"),
        ({"queries": torch.tensor([5])}, r"queries is torch.int64 \(1,\), expected a tensor of token ids \[B, L\]"),
        ({"queries": torch.tensor([[5.0]])}, "queries is torch.float32"),
        ({"txt_len": 0}, "txt_len is 0, expected a whole number from 1"),
        ({"txt_len": 2.5}, "txt_len is 2.5, expected a whole number from 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_bad_input_of_respond_to_batch_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        respond_to_batch(tiny_model("gpt2"), **({"queries": torch.tensor([[5]])} | arguments))
