"""Decoding of our own against transformers': the same tokens without draws, the same distribution with them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_runtime import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer
from ppo_runtime.rollout import decoding, engine
from ppo_runtime.rollout.batching import by_length, rows_together
from ppo_runtime.rollout.sampling import plain
from tests.runtime.support.tiny import (
    CAUSAL_FAMILIES,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    tiny_lora,
    tiny_model,
    tiny_tokenizer,
)
from tests.runtime.support.trainers import SETTINGS, make_trainer

# Ragged, with equal ones among them; some are longer than gemma2's and the mistral's sliding window.
QUERIES = [torch.arange(3, 3 + length) for length in (5, 2, 14, 2, 9, 1, 14)]
ENDS = list(range(20, 60))


def tokens(rows: Any) -> list[list[int]]:
    return [row.tolist() for row in rows]


def by_transformers(trainer: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[int]]:
    with monkeypatch.context() as context:
        context.setattr(engine, "obstacle", lambda *_: "as a comparison")
        return tokens(trainer.generate(QUERIES, return_prompt=False, **options))


def ours(trainer: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[int]]:
    """And nothing is left to transformers."""
    with monkeypatch.context() as context:
        context.setattr(engine, "_by_transformers", None)
        return tokens(trainer.generate(QUERIES, return_prompt=False, **options))


@pytest.mark.parametrize("batch_size", [None, 7, 3])
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    family: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every family, with rows that end at different times, and with padding before prompts."""
    trainer = make_trainer(family)
    if family == "mistral":
        trainer.model.config.sliding_window = 6
    for ends in (None, ENDS):
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 15, "eos_token_id": ends}
        found = ours(trainer, monkeypatch, batch_size=batch_size, **options)
        assert found == by_transformers(trainer, monkeypatch, batch_size=7, **options)
    assert len(set(map(len, found))) > 1, "rows ended apart"


@pytest.mark.parametrize(
    "options", [{"min_new_tokens": 4}, {"min_length": 16}, {"max_new_tokens": None, "max_length": 20}]
)
def test_lengths_are_those_of_transformers(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": ENDS, "batch_size": 7} | options
    found = ours(trainer, monkeypatch, **options)
    assert found == by_transformers(trainer, monkeypatch, **options)
    assert found != ours(trainer, monkeypatch, do_sample=False, max_new_tokens=9, eos_token_id=ENDS)


def test_an_adapter_is_on_for_the_policy_and_off_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppo_runtime import PPOConfig, PPOTrainer
    from tests.runtime.support.tiny import tiny_tokenizer
    from tests.runtime.support.trainers import SETTINGS

    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_model("llama"), peft_config=tiny_lora("llama", init_lora_weights=False)
    )
    trainer = PPOTrainer(PPOConfig(**SETTINGS), model, None, tiny_tokenizer())
    options = {"do_sample": False, "max_new_tokens": 8, "return_prompt": False, "generate_ref_response": True}
    policy, reference = trainer.generate(QUERIES, **options)
    monkeypatch.setattr(engine, "obstacle", lambda *_: "as a comparison")
    expected = trainer.generate(QUERIES, **options)
    assert [tokens(policy), tokens(reference)] == [*map(tokens, expected)]
    assert tokens(policy) != tokens(reference)


def test_criteria_see_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, as transformers shows it: rows that are over go on with padding."""
    trainer = make_trainer()

    def record(seen: list[Any]) -> Any:
        def ends(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            seen.append(input_ids.tolist())
            return input_ids[:, -1] % 3 == 0

        return ends

    mine: list[Any] = []
    theirs: list[Any] = []
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD_ID, "batch_size": 7}
    found = ours(trainer, monkeypatch, stopping_criteria=[record(mine)], **options)
    assert found == by_transformers(trainer, monkeypatch, stopping_criteria=[record(theirs)], **options)
    assert mine == theirs


def test_equal_prompts_are_read_once_and_rows_that_are_over_leave() -> None:
    trainer = make_trainer()
    shapes: list[tuple[int, ...]] = []
    inner = trainer.model.pretrained_model
    hook = inner.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    trainer.generate(QUERIES[:1], max_new_tokens=1, do_sample=False)  # the model is tried once
    shapes.clear()
    torch.manual_seed(0)
    rows = trainer.generate([QUERIES[0]] * 6, return_prompt=False, **plain(max_new_tokens=12, eos_token_id=ENDS[:9]))
    hook.remove()
    lengths = [len(row) for row in rows]
    assert shapes[0] == (1, 5)
    # A step reads one token of each row that goes on.
    assert [rows for rows, _ in shapes[1:]] == [
        sum(length > step for length in lengths) for step in range(1, max(lengths))
    ]
    assert len({*lengths}) > 2


def test_draws_do_not_depend_on_how_rows_are_batched() -> None:
    """Nor on how long the others go on; the global generator moves by the same amount."""
    trainer = make_trainer("gpt2")

    def drawn(batch_size: int | None, most: int = 70, queries: Any = QUERIES) -> tuple[list[list[int]], int]:
        torch.manual_seed(5)
        # More steps than are drawn for at a time, whatever they are: context is short, so are prompts here.
        rows = trainer.generate(
            [query[:2] for query in queries],
            batch_size=batch_size,
            return_prompt=False,
            **plain(max_new_tokens=min(most, 62), eos_token_id=[3]),
        )
        return tokens(rows), int(torch.randint(2**40, ()))

    expected = drawn(None)
    assert all(drawn(size) == expected for size in (1, 2, 3, 7))
    shorter, after = drawn(2, most=5)
    assert shorter == [row[:5] for row in expected[0]]
    assert after == expected[1]
    torch.manual_seed(6)
    assert tokens(trainer.generate(QUERIES, return_prompt=False, **plain(max_new_tokens=9))) != [
        row[:9] for row in expected[0]
    ]


def exact(model: Any, prompt: Tensor, steps: int, ends: int, **warped: float) -> dict[tuple[int, ...], float]:
    """Every sequence that can be drawn and its probability, by plain forward passes over all of them."""
    found: dict[tuple[int, ...], float] = {}
    open_rows: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for step in range(steps):
        batch = torch.tensor([[*prompt.tolist(), *row] for row, _ in open_rows])
        with torch.no_grad():
            logits = model(batch).logits[:, -1].double() / warped.get("temperature", 1.0)
        if top_k := int(warped.get("top_k", 0)):
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        going: list[tuple[tuple[int, ...], float]] = []
        for (row, share), line in zip(open_rows, logits.softmax(-1).tolist(), strict=True):
            for token, probability in enumerate(line):
                longer = ((*row, token), share * probability)
                if token == ends or step + 1 == steps:
                    found[longer[0]] = longer[1]
                elif probability:
                    going.append(longer)
        open_rows = going
    return {row: share for row, share in found.items() if share}


@pytest.mark.parametrize("by", ["ours", "transformers"])
@pytest.mark.parametrize("warped", [{}, {"temperature": 0.7, "top_k": 3}], ids=["plain", "temperature and top_k"])
def test_sequences_come_as_often_as_the_model_says(
    by: str, warped: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences of a vocabulary of 5 and 3 tokens, enumerated: chi-squared at a level of 1e-6.

    In batches with padding before some prompts, and rows that end early.
    """
    trainer = make_trainer("llama")
    trainer.model.pretrained_model = model = tiny_model("llama", vocab_size=5)
    if by == "transformers":
        monkeypatch.setattr(engine, "obstacle", lambda *_: "as a comparison")
    queries, draws = [torch.tensor([2, 3, 4]), torch.tensor([4])], 6000
    settings: dict[str, Any] = plain(max_new_tokens=3, eos_token_id=EOS_ID) | warped
    torch.manual_seed(1)
    rows = trainer.generate(
        queries * draws,
        batch_size=3000,
        return_prompt=False,
        pad_token_id=PAD_ID,
        **settings,
    )
    for place, query in enumerate(queries):
        counts: dict[tuple[int, ...], int] = {}
        for row in tokens(rows[place::2]):
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        expected = exact(model, query, 3, EOS_ID, **warped)
        assert set(counts) <= set(expected)
        assert sum(expected.values()) == pytest.approx(1)
        # Rare ones are put together, so that the approximation holds.
        usual = {row: share * draws for row, share in expected.items() if share * draws >= 10}
        rest = draws - sum(usual.values())
        chi = sum((counts.get(row, 0) - mean) ** 2 / mean for row, mean in usual.items())
        if rest > 1:
            chi += (draws - sum(counts.get(row, 0) for row in usual) - rest) ** 2 / rest
        degrees = torch.tensor(float(len(usual)), dtype=torch.float64)
        level = 1 - torch.special.gammainc(degrees / 2, torch.tensor(chi, dtype=torch.float64) / 2)
        assert level > 1e-6
        assert len(usual) > 9


LEFT_TO_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "a penalty": {"repetition_penalty": 1.5},
    "a processor": {"logits_processor": [lambda ids, scores: scores]},
    "a prefix": {"prefix_allowed_tokens_fn": lambda *_: [5, 6]},
    "no cache": {"use_cache": False},
    "another cache": {"cache_implementation": "static"},
    "a time": {"max_time": 100.0},
    "words": {"bad_words_ids": [[7]]},
}


@pytest.mark.parametrize("case", LEFT_TO_TRANSFORMERS)
def test_what_is_not_heeded_is_left_to_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_left_to_transformers(make_trainer(), monkeypatch, **LEFT_TO_TRANSFORMERS[case])


def test_encoder_decoders_and_fixed_widths_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    check_left_to_transformers(make_trainer("t5"), monkeypatch)
    padded = make_trainer(pad_for_acceleration=True, pad_max_len=40, pad_max_input_len=20)
    check_left_to_transformers(padded, monkeypatch)


def test_a_cache_that_rows_cannot_leave_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out on a few tokens, not known by name."""
    trainer = make_trainer()
    with monkeypatch.context() as context:
        context.setattr(decoding.DynamicCache, "batch_select_indices", lambda self, indices: None)
        check_left_to_transformers(trainer, monkeypatch)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_no_length_at_all_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    check_left_to_transformers(make_trainer(), monkeypatch, max_new_tokens=None)


def test_a_wrapper_with_a_generate_of_its_own_is_asked() -> None:
    class Own(AutoModelForCausalLMWithValueHead):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(1)
            return super().generate(*args, **kwargs)

    asked: list[int] = []
    trainer = PPOTrainer(PPOConfig(**SETTINGS), Own.from_pretrained(tiny_model("llama")), None, tiny_tokenizer())
    trainer.generate(QUERIES[:2], max_new_tokens=3, pad_token_id=PAD_ID)
    assert asked


def check_left_to_transformers(trainer: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(decoding, "decode", None)
    trainer.generate(QUERIES[:2], **({"max_new_tokens": 3, "pad_token_id": PAD_ID} | options))


def test_numbers_that_are_none_are_refused() -> None:
    """Ours or transformers', before a model was tried and afterwards."""
    trainer = make_trainer()
    trainer.generate(QUERIES, **plain(max_new_tokens=3))
    with torch.no_grad():
        trainer.model.pretrained_model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="logits hold NaN or infinity"):
        trainer.generate(QUERIES, **plain(max_new_tokens=3))
    fresh = make_trainer()
    with torch.no_grad():
        fresh.model.pretrained_model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="nan"):
        fresh.generate(QUERIES, **plain(max_new_tokens=3))


def test_as_many_rows_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppo_runtime.rollout import batching

    model = tiny_model("llama")
    free = 2**20
    monkeypatch.setattr(batching, "own_share", lambda: free)
    some = rows_together(model, 10, 10)
    # Keys and values of 2 layers and one head of 8, twice; 12 hidden widths; scores.
    per_row = 2 * (2 * 2 * 1 * 8 * 4) * 20 + 12 * 16 * 4 * 10 + 4 * 4 * VOCAB_SIZE
    assert some == free // 2 // per_row
    assert rows_together(model, 10, 30) < some
    assert rows_together(model, 10, 10, beams=4) in (some // 4, some // 4 + 1)
    model.set_attn_implementation("eager")
    assert rows_together(model, 10, 10) == free // 2 // (per_row + 2 * 4 * model.config.num_attention_heads * 10**2)
    free = 1
    assert rows_together(model, 10, 10) == 1
    assert by_length([torch.arange(length) for length in (2, 5, 2, 3)]) == [1, 3, 0, 2]


@pytest.mark.parametrize("memory_for", [1, 3, None])
def test_answers_come_in_the_order_of_the_queries(memory_for: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits into memory, with one draw of a length for every four queries."""
    from ppo_runtime.rollout import generating

    if memory_for is not None:
        monkeypatch.setattr(generating, "rows_together", lambda *_, **__: memory_for)
    trainer = make_trainer()
    drawn: list[int] = []
    lengths = itertools.count(3)

    def sampler() -> int:
        drawn.append(next(lengths))
        return drawn[-1]

    rows = trainer.generate(QUERIES, sampler, do_sample=False, eos_token_id=None)
    assert [row[: len(query)].tolist() for row, query in zip(rows, QUERIES, strict=True)] == tokens(QUERIES)
    assert drawn == [3, 4]
    assert [len(row) - len(query) for row, query in zip(rows, QUERIES, strict=True)] == [3] * 4 + [4] * 3
    assert len(trainer.generate(QUERIES, LengthSampler(2, 5), do_sample=True)) == len(QUERIES)


@pytest.mark.parametrize("ends", [None, ENDS, [PAD_ID]], ids=["nothing", "EOS", "padding"])
@pytest.mark.parametrize("by", ["us", "transformers", "beams"])
def test_drawn_lengths_do_not_depend_on_memory(by: str, ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the answers, which are those of a call with that length alone."""
    from ppo_runtime.rollout import generating

    trainer = make_trainer()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": ends}
    if by == "beams":
        options["num_beams"] = 2
    run = ours if by == "us" else by_transformers
    found: list[list[list[int]]] = []
    for rows in (1, 2, 3, 5, len(QUERIES)):
        monkeypatch.setattr(generating, "rows_together", lambda *_, rows=rows, **__: rows)
        lengths = iter([9, 2])
        found.append(run(trainer, monkeypatch, length_sampler=lambda lengths=lengths: next(lengths), **options))
    assert all(one == found[0] for one in found)
    for places, length in ((slice(0, 4), 9), (slice(4, None), 2)):
        alone = trainer.generate(QUERIES[places], return_prompt=False, batch_size=4, max_new_tokens=length, **options)
        assert found[0][places] == tokens(alone)


def test_sampled_answers_do_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppo_runtime.rollout import generating

    found: list[list[list[int]]] = []
    for rows in (1, 3, len(QUERIES)):
        monkeypatch.setattr(generating, "rows_together", lambda *_, rows=rows, **__: rows)
        trainer = make_trainer()
        found.append(ours(trainer, monkeypatch, length_sampler=LengthSampler(2, 16), **plain()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("by", ["us", "transformers"])
@pytest.mark.parametrize(
    "length",
    [
        {"max_length": 20, "eos_token_id": None},
        {"max_new_tokens": 6, "min_length": 18, "eos_token_id": list(range(3, 60))},
    ],
)
def test_lengths_that_count_the_prompt_do_not_depend_on_memory(
    length: dict[str, Any], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count the longest prompt of the call, whatever it is batched with."""
    from ppo_runtime.rollout import generating

    trainer, run = make_trainer(), ours if by == "us" else by_transformers
    found: list[list[list[int]]] = []
    for rows in (1, 3, len(QUERIES)):
        monkeypatch.setattr(generating, "rows_together", lambda *_, rows=rows, **__: rows)
        found.append(run(trainer, monkeypatch, do_sample=False, **length))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria"])
def test_functions_of_the_callers_see_rows_in_their_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at a time, whatever fits into memory, and the seed alone decides what is sampled."""
    from ppo_runtime.rollout import generating

    trainer = make_trainer()
    found: list[Any] = []
    for rows in (1, 3, len(QUERIES)):
        seen: list[Any] = []

        def prefix(row: int, ids: Tensor, seen: list[Any] = seen) -> list[int]:
            seen.append((row, ids.tolist()))
            return list(range(3, 90))

        def processor(ids: Tensor, scores: Tensor, seen: list[Any] = seen) -> Tensor:
            seen.append(ids.tolist())
            return scores

        def criterion(ids: Tensor, scores: Any, seen: list[Any] = seen, **_: Any) -> Tensor:
            seen.append(ids.tolist())
            return ids[:, -1] % 3 == 0

        functions = {"prefix_allowed_tokens_fn": prefix, "logits_processor": [processor]}
        functions["stopping_criteria"] = [criterion]
        monkeypatch.setattr(generating, "rows_together", lambda *_, rows=rows, **__: rows)
        torch.manual_seed(0)
        options = plain(max_new_tokens=5, eos_token_id=None, pad_token_id=PAD_ID) | {name: functions[name]}
        found.append((tokens(trainer.generate(QUERIES, **options)), seen))
    assert found[0] == found[1] == found[2]
    _, seen = found[0]
    if name == "prefix_allowed_tokens_fn":
        assert {row for row, _ in seen} == {0, 1, 2, 3}
    else:
        width = max(map(len, QUERIES[:4]))
        together = [row[:width][-len(query) :] for row, query in zip(seen[0], QUERIES, strict=False)]
        assert together == tokens(QUERIES[:4])


@pytest.mark.parametrize("values", [[(1, 2), (3, 4)], [2.5], ["a", 3], [], [-4], [True], 7])
def test_values_that_are_no_lengths_are_ignored(values: Any) -> None:
    class Sampler:
        def __init__(self) -> None:
            self.values = values

        def __call__(self) -> int:
            return 2

    rows = make_trainer().generate(QUERIES, Sampler(), return_prompt=False, do_sample=False, eos_token_id=None)
    assert [len(row) for row in rows] == [2] * len(QUERIES)


def test_rows_at_their_limit_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    token = decoding.Pass.token
    monkeypatch.setattr(decoding.Pass, "token", lambda self, *rest: read.append(len(rest[0])) or token(self, *rest))
    lengths = iter([4, 2])
    make_trainer().generate(QUERIES, lambda: next(lengths), do_sample=False, eos_token_id=None)
    assert read[-3:] == [7, 4, 4]  # the model is tried before


def test_an_engine_that_knows_of_no_limits_is_cut_to_them() -> None:
    def canned(model: Any, queries: Any, settings: Any, plan: Any, new_tokens: Any, ours: Any) -> list[Tensor]:
        return [torch.arange(3, 12) for _ in queries]

    trainer = make_trainer()
    trainer.response_engine = canned
    lengths = iter([4, 2])
    rows = trainer.generate(QUERIES, lambda: next(lengths), return_prompt=False, do_sample=True, top_k=0)
    assert [len(row) for row in rows] == [4] * 4 + [2] * 3
    assert all(trainer.response_generator.remembered.drawn.returned(row) for row in rows)
