"""What one rank of two finds wrong by itself, both refuse, in the same words, which name it; and go on together.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.learning import sameness
from ppo_runtime.ranks.agreement import agree_largest, all_or_none, differences, gathered
from ppo_runtime.ranks.world import World, named, world_from_environment
from tests.runtime.ranks import matrix
from tests.runtime.support.processes import run_ranks
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer

ALONE = World(rank=0, size=1)
# What both ranks say where the second one is wrong, and where the first one is.
SAID: dict[str, tuple[str, str]] = {
    "score_function_raises": ("RuntimeError", "ZeroDivisionError: the judge divides"),
    "score_is_nan": ("ValueError", "scores[0] is nan"),
    "scores_are_too_few": ("ValueError", "score_fn returned 2 scores"),
    "row_is_too_long": ("ValueError", "queries[1]"),
    "sequences_are_too_few": ("ValueError", "queries has 2 rows"),
    "other_mini_batches": ("ValueError", "mini_batch_size is "),
    "other_layer_frozen": ("ValueError", "layers.0.self_attn.q_proj.weight of model is "),
    "other_embedding_frozen": ("ValueError", "embed_tokens.weight of model is "),
    "model_without_numbers": ("ValueError", "model has parameters on the meta device"),
    "other_weights": ("ValueError", "the sum of bits of v_head.summary.weight is "),
    "other_moments": ("ValueError", "the sum of bits of optimizer's step of v_head.summary.weight is "),
    "other_checkpointing": ("ValueError", "the gradient checkpointing of model is "),
    "other_learning_rate": ("ValueError", "lr of optimizer group 0 is "),
    "other_kl_coefficient": ("ValueError", "kl_ctl.value is "),
    "other_settings": ("ValueError", "mini_batch_size is "),
    "other_model": ("ValueError", "of model is "),
    "other_lora": ("ValueError", "lora_alpha of adapter 'default' of model is "),
    "other_dropout": ("ValueError", "attention_dropout of the configuration of model is "),
    "other_attention": ("ValueError", "the attention of model is "),
    "other_reference": ("ValueError", "rms_norm_eps of the configuration of ref_model is "),
    "other_tokens": ("ValueError", "the number of tokens of tokenizer is "),
    "no_tokenizer": ("TypeError", "tokenizer is None"),
    "reference_on_one": ("ValueError", "ref_model is "),
    "other_rows": ("ValueError", "the number of rows of dataset is "),
    "other_prompt": ("ValueError", "the digest of dataset's prompts is "),
    "keys_differ": ("ValueError", "more"),
    "reward_is_refused": ("ValueError", "rewards[1] is nan"),
    "tracker_fails": ("", ""),
    "disk_is_full": ("OSError", "No space left on device"),
    "raises_in_an_update": ("RuntimeError", "MemoryError: no room for the gradients"),
}

# Parts of a trainer that may be the user's own, and what a step calls of them.
PARTS = {"optimizer": "step", "optimizer of pieces": "step", "kl_ctl": "update"}


def raising(error: BaseException | None, other: BaseException | None, rank: int) -> None:
    error = error if rank == 0 else other
    if error is not None:
        raise error


BLOCKS: dict[str, Callable[[int], None]] = {
    "one": partial(raising, None, ValueError("x is 1, expected 2")),
    "one interrupted": partial(raising, KeyboardInterrupt(), None),
    "both alike": partial(raising, LookupError("x"), LookupError("x")),
    "both unlike": partial(raising, TypeError("x is a str"), ValueError("x is 1")),
    "a file": partial(raising, FileNotFoundError(errno.ENOENT, "No such file", "a"), None),
    "own kind": partial(raising, None, type("Own", (ValueError,), {})("x")),
    "text that can't be had": partial(raising, type("Mute", (Exception,), {"__str__": lambda _: 1 / 0})(), None),
    "an iteration stopped": partial(raising, None, StopIteration()),
    "not made of a text": partial(raising, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), None),
}


def tried(block: Callable[[int], None], world: World) -> dict[str, Any]:
    try:
        with all_or_none(world, carries=2) as ballot:
            ballot.mine[0] = world.rank
            block(world.rank)
    except BaseException as error:
        cause = None if error.__cause__ is None else repr(error.__cause__)
        return {"kind": type(error).__name__, "text": str(error), "cause": cause}
    return {"kind": "", "text": str(ballot.all.tolist()), "cause": None}


def apart(world: World, *blocks: Callable[[], Any]) -> str:
    """What is said where each rank has come to something else."""
    try:
        blocks[world.rank]()
    except (RuntimeError, ValueError, LookupError) as error:
        return str(error)
    return ""


def ballot(world: World, carries: int, phase: str) -> None:
    with all_or_none(world, carries=carries, phase=phase):
        pass


def other_calls(world: World) -> dict[str, str]:
    """Other calls of the trainer on each of two ranks, again and again with the same one."""
    trainer, batch = make_trainer(), make_batch()
    places = iter(TemporaryDirectory() for _ in range(9))
    calls: dict[str, Callable[[], Any]] = {
        "step": lambda: trainer.step(*batch),
        "save_checkpoint": lambda: save_checkpoint(trainer, next(places).name),
        "wait_for_everyone": lambda: trainer.accelerator.wait_for_everyone(),
        "log_stats": lambda: trainer.log_stats({}, {}, batch[2]),
    }
    found = {
        f"{first} and {second}": apart(world, calls[first], calls[second]) for first, second in permutations(calls, 2)
    }
    found["afterwards"] = str(float(trainer.step(*batch)["objective/kl"]))
    return found


def part_raises(part: str, method: str, culprits: set[int], world: World, folder: Path) -> dict[str, Any]:
    """What is said where a part of the user's fails in an update, and by the next one, before and after loading."""
    trainer, batch = make_trainer(mini_batch_size=6), make_batch()
    call = partial(by_pieces, trainer) if part == "optimizer of pieces" else partial(trainer.step, *batch)
    held = getattr(trainer, part.partition(" ")[0])
    save_checkpoint(trainer, folder)
    if world.rank in culprits:
        error = LookupError("a bad option")
        setattr(held, method, lambda *_: raising(error, error, world.rank))
    told: list[str] = []
    (handler := logging.Handler()).emit = lambda record: told.append(record.getMessage())
    logging.getLogger("ppo_runtime.trainer").addHandler(handler)
    said = apart(world, call, call)
    vars(held).pop(method, None)
    again = apart(world, call, call)
    load_checkpoint(trainer, folder)
    call()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {"said": said, "again": again, "whole": trainer.broken_off is None, "weights": weights, "told": told}


def by_pieces(trainer: PPOTrainer, shift: int = 0, *, spent: bool = False) -> None:
    """An update of TRL's pieces; with a shift its mask does not fit, and a graph that is spent has no backward pass."""
    queries, responses, _ = make_batch()
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    assert values is not None
    if spent:
        (logprobs.sum() + values.sum()).backward()
    old = logprobs.detach(), values.detach()
    targets = torch.ones_like(old[0]), torch.ones_like(old[0])
    trainer.train_minibatch(*old, logprobs, logits, values, mask[:, shift:], *targets)


def piece_refused(world: World) -> str:
    """A minibatch of TRL's pieces that one rank refuses, which is made again afterwards."""
    trainer = make_trainer(mini_batch_size=6)
    said = apart(world, *[partial(by_pieces, trainer, shift=world.rank)] * 2)
    by_pieces(trainer)
    return said


def called_alone(case: matrix.Case, number: int, engine: str, folder: Path) -> list[str]:
    """What a rank of two says where the first, or the second one, alone calls something."""
    places = [folder / f"{case.__name__}-{culprit}" for culprit in range(2)]
    for place in places:
        place.mkdir(exist_ok=True)
    ranks = (matrix.Rank(number, number == culprit, engine, place) for culprit, place in enumerate(places))
    return [matrix.tried(case.__name__, rank)[0].message for rank in ranks]


def assert_parted(said: list[str], elsewhere: bool = True) -> None:
    """Both are told which rank is where, or nothing is wrong."""
    words = "the ranks have parted, rank 0 in " if elsewhere else ""
    assert all(text.startswith(words) and bool(text) == elsewhere for text in said), said
    assert all("call this on every rank" in text for text in said if elsewhere)


def pass_fails(world: World) -> str:
    """A backward pass that one rank cannot make, and one of both."""
    trainer = make_trainer(mini_batch_size=6)
    said = apart(world, *[partial(by_pieces, trainer, spent=world.rank == 1)] * 2)
    by_pieces(trainer)
    return said


def compared(world: World, facts: dict[str, Any]) -> str:
    try:
        with all_or_none(world) as ballot:
            ballot.facts = lambda: facts
    except ValueError as error:
        return str(error)
    return ""


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    world = world_from_environment()
    results: dict[str, Any] = {name: tried(block, world) for name, block in BLOCKS.items()}
    results["afterwards"] = tried(lambda _: None, world)
    results["facts"] = compared(world, {"a": 1, "b": 2 + world.rank, f"c{world.rank}": None})
    results["same facts"] = compared(world, {"a": 1, "b": "x"})
    results["differences"] = differences({"torch": f"2.{world.rank}"}, world)
    results["largest"] = agree_largest(world.rank, world)
    results["sizes apart"] = apart(world, partial(ballot, world, 0, "one"), partial(ballot, world, 2, "one"))
    results["places apart"] = apart(
        world,
        partial(ballot, world, 0, "one"),
        partial(gathered, torch.ones(4096), world, "another"),
    )
    results["long"] = gathered(torch.full((200,), world.rank), world, "one").sum(-1).tolist()
    results["calls"] = other_calls(world)
    for part, method in PARTS.items():
        results[part] = [
            part_raises(part, method, culprits, world, folder / f"{part}-{culprits}") for culprits in ({0}, {1}, {0, 1})
        ]
    results["piece"] = piece_refused(world)
    results["pass"] = pass_fails(world)
    for case in SAID:
        for culprit in range(world.size):
            (place := folder / f"{case}-{culprit}").mkdir(exist_ok=True)
            found, _ = matrix.tried(case, matrix.Rank(world.rank, world.rank == culprit, "ddp", place))
            results[f"{case} {culprit}"] = found._asdict()
    results["alone"] = {case.__name__: called_alone(case, world.rank, "ddp", folder) for case in matrix.CALLED_ALONE}
    torch.save(results, folder / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks have met."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), warnings="default")


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("case", SAID)
def test_both_ranks_refuse_what_one_finds_wrong(ranks: list[dict[str, Any]], case: str, culprit: int) -> None:
    first, second = ((rank[f"{case} {culprit}"]["kind"], rank[f"{case} {culprit}"]["message"]) for rank in ranks)
    kind, text = SAID[case]
    assert first == second
    assert first[0] == kind or not kind
    assert text in first[1]
    assert f"rank {culprit}" in first[1]


@pytest.mark.parametrize("case", matrix.COLLECTIVES | matrix.WHERE_DIVIDED)
def test_what_one_rank_alone_calls_is_told_on_both(ranks: list[dict[str, Any]], case: str) -> None:
    """Or is no collective where every rank has the whole model."""
    first, second = (rank["alone"][f"{case}_alone"] for rank in ranks)
    assert first == second
    assert_parted(first, case in matrix.COLLECTIVES)


def test_every_case_has_its_words() -> None:
    assert SAID.keys() == {case.__name__ for case in matrix.AGREED}


def test_one_error_is_everybodys(ranks: list[dict[str, Any]]) -> None:
    """Of its kind, with its text, and on the rank that has it with the error itself behind it."""
    first, second = (rank["one"] for rank in ranks)
    assert first["kind"] == second["kind"] == "ValueError"
    assert first["text"] == second["text"] == "rank 1: x is 1, expected 2"
    assert first["cause"] is None
    assert second["cause"] == "ValueError('x is 1, expected 2')"


def test_a_rank_that_is_interrupted_stops_and_the_others_say_so(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["one interrupted"] for rank in ranks)
    assert first["kind"] == "KeyboardInterrupt"
    assert (second["kind"], second["text"]) == ("RuntimeError", "rank 0: KeyboardInterrupt")


def test_what_all_ranks_say_alike_is_raised_as_it_is(ranks: list[dict[str, Any]]) -> None:
    assert [(rank["both alike"]["kind"], rank["both alike"]["text"]) for rank in ranks] == [("LookupError", "x")] * 2


@pytest.mark.parametrize(
    ("block", "kind", "text"),
    [
        ("both unlike", "TypeError", "rank 0: x is a str; rank 1: x is 1"),
        ("a file", "FileNotFoundError", "rank 0: [Errno 2] No such file: 'a'"),
        ("own kind", "ValueError", "rank 1: x"),
        ("text that can't be had", "RuntimeError", "rank 0: Mute: (its text can't be had: ZeroDivisionError)"),
        ("an iteration stopped", "RuntimeError", "rank 1: StopIteration"),
        ("not made of a text", "ValueError", "rank 0: 'utf-8' codec can't decode"),
    ],
)
def test_kinds_that_all_ranks_can_raise(ranks: list[dict[str, Any]], block: str, kind: str, text: str) -> None:
    for rank in ranks:
        assert rank[block]["kind"] == kind
        assert rank[block]["text"].startswith(text)


def test_ranks_are_in_step_after_a_refusal(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["afterwards"]["text"] == "[[0.0, 0.0], [1.0, 0.0]]" for rank in ranks)
    assert [rank["largest"] for rank in ranks] == [1, 1]


def test_facts_that_differ_are_named_with_every_ranks_value(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        said = "b is 2 on rank 0 and 3 on rank 1; c0 is None on rank 0 and absent on rank 1; c1 is absent on rank 0 and"
        assert rank["facts"].startswith(said)
        assert rank["same facts"] == ""
        assert rank["differences"] == ["torch is '2.0' on rank 0 and '2.1' on rank 1"]


def test_ranks_that_come_to_different_places_say_where_each_is(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["places apart"].startswith("the ranks have parted, rank 0 in one and rank 1 in another: call this")
        assert rank["sizes apart"].startswith("the ranks have parted, ranks 0 and 1 in one")
        assert rank["long"] == [0, 200]


def test_ranks_that_call_different_things_can_go_on_together(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["calls"] for rank in ranks)
    assert first == second
    steps = first.pop("afterwards")
    assert float(steps) == float(steps)
    assert len(first) == 12
    assert all(said.startswith("the ranks have parted, rank 0 in ") for said in first.values()), first


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fails_loses_no_rank(ranks: list[dict[str, Any]], part: str) -> None:
    """But where one rank alone has stepped, weights differ from then on, until all load a checkpoint."""
    broken = "'broken off (load a checkpoint on all ranks)'"
    parted = f"{broken} on rank 0 and 'made' on rank 1", f"'made' on rank 0 and {broken} on rank 1"
    for rank in ranks:
        said = [found["said"] for found in rank[part]]
        assert said == ["rank 0: LookupError: a bad option", "rank 1: LookupError: a bad option", "a bad option"]
        again = [found["again"].partition(";")[0] for found in rank[part]]
        assert again == ([*(f"the last update is {values}" for values in parted), ""] if "opt" in part else 3 * [""])
        assert all(found["whole"] for found in rank[part])
    for first, second in zip(*(rank[part] for rank in ranks), strict=True):
        advised = [line for line in first["told"] + second["told"] if "between two steps" in line]
        assert all(line.endswith("load a checkpoint on all ranks") for line in advised)
        assert part != "optimizer" or advised
        assert torch.equal(first["weights"], second["weights"])


def test_a_piece_that_one_rank_refuses_is_refused_by_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["piece"] for rank in ranks)
    assert first == second
    assert first.startswith("rank 1: mask ")


def test_a_backward_pass_that_one_rank_cannot_make_is_named_on_both(ranks: list[dict[str, Any]]) -> None:
    assert "backward through the graph a second time" in ranks[1]["pass"]
    assert ranks[0]["pass"].startswith("rank 1: ")
    assert "backward through the graph a second time" in ranks[0]["pass"]


def test_alone_an_error_is_untouched() -> None:
    error = ValueError("x")
    with pytest.raises(ValueError, match=r"^x$") as caught, all_or_none(ALONE):
        raise error
    assert caught.value is error
    with all_or_none(ALONE, carries=1) as ballot:
        ballot.mine[0] = 3
        ballot.facts = lambda: pytest.fail("nothing to compare with")
    assert ballot.all.tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1], "rank 1"),
        ([0, 2], "ranks 0 and 2"),
        ([0, 1, 2, 3], "ranks 0, 1, 2 and 3"),
        ([*range(7)], "ranks 0, 1, 2, 3 and 3 more"),
    ],
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert named(ranks) == words


def test_every_rank_has_a_gpu_of_its_own() -> None:
    first, second, cpu = (sameness.settings(PPOConfig(device=name)) for name in ("cuda:0", "cuda:1", "cpu"))
    assert first == second != cpu


def test_settings_of_generation_are_plain() -> None:
    config = GenerationConfig(temperature=0.5)
    facts = sameness.generation({"top_k": torch.tensor(3), "stopping_criteria": [print], "generation_config": config})
    assert facts["temperature of generation_config"] == 0.5
    assert facts["top_k of generation_kwargs"] == 3
    assert facts["stopping_criteria of generation_kwargs"] == [type(print).__name__]


def test_value_heads_that_every_rank_has_drawn_for_its_reference_are_no_difference() -> None:
    policy, reference, other = (
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama")) for _ in range(3)
    )
    torch.nn.init.normal_(other.v_head.summary.weight)
    assert sameness.models(policy, reference) == sameness.models(policy, other)
    torch.nn.init.normal_(other.pretrained_model.lm_head.weight)
    assert sameness.models(policy, reference) != sameness.models(policy, other)


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_sums_of_bits_know_every_number_wherever_it_lies(kind: torch.dtype) -> None:
    x = torch.arange(1, 13).to(kind)
    others = [x + torch.eye(12)[place].to(kind) for place in range(12)]
    (here, moved), changed = sameness._bits([x[1:], x[1:].clone()]), sameness._bits(others)
    assert here == moved
    assert sameness._bits([x])[0] not in changed
