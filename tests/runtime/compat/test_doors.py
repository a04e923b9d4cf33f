"""Bad values for every argument of `step` and of its pieces: each is named with what was expected, none is cryptic.

What is accepted on purpose is written down as well. A value is tried in place of a good one, everything else being
good, so that the answer can only be about it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runtime import PPOTrainer, stack_dicts
from tests.runtime.support.trainers import make_batch, make_trainer

Good = dict[str, Any]
Change = Callable[[Any], Any]
NAN = float("nan")


def each(change: Change) -> Change:
    """The same change to each entry of a list."""
    return lambda rows: [change(row) for row in rows]


ROWS: dict[str, Change] = {
    "None": lambda _: None,
    "a number": lambda _: 3,
    "text": lambda _: "abcdef",
    "a dictionary": lambda rows: dict(enumerate(rows)),
    "a generator": lambda rows: (row for row in rows),
    "a tensor": lambda _: torch.ones(6, 3, dtype=torch.long),
    "no rows": lambda _: [],
    "fewer rows": lambda rows: rows[:-1],
    "Nones": each(lambda _: None),
    "arrays": each(lambda row: row.numpy()),
    "0-d": each(lambda row: row[0]),
    "2-d": each(lambda row: row[None]),
    "floats": each(lambda row: row.float()),
    "complex": each(lambda row: row.to(torch.complex64)),
    "booleans": each(lambda row: row.bool()),
    "negative": each(lambda row: -row),
    "beyond the vocabulary": each(lambda row: row + 1000),
    "empty": each(lambda row: row[:0]),
    "meta": each(lambda row: row.to("meta")),
    "sparse": each(lambda row: row.to_sparse()),
}
SIZED_ROWS = {name: ROWS[name] for name in ("None", "a number", "fewer rows", "Nones", "0-d")}
SCORES: dict[str, Change] = {
    "None": lambda _: None,
    "a number": lambda _: 1.0,
    "text": lambda _: "abcdef",
    "bytes": lambda _: b"abcdef",
    "a dictionary": lambda _: {},
    "fewer": lambda scores: scores[:-1],
    "Nones": each(lambda _: None),
    "texts": each(lambda _: "1"),
    "lists": each(lambda score: [float(score)]),
    "empty": each(lambda _: torch.ones(0)),
    "two": each(lambda _: torch.ones(2)),
    "complex": each(lambda _: torch.tensor(1j)),
    "complex numbers": each(lambda _: 1j),
    "meta": each(lambda score: score.to("meta")),
    "NaN": each(lambda _: NAN),
    "infinite": each(lambda _: torch.tensor(float("inf"))),
    "1e39": each(lambda _: 1e39),
    "1e400": each(lambda _: -(10**400)),
}
MASKS: dict[str, Change] = {
    "a number": lambda _: 3,
    "text": lambda _: "abcdef",
    "a dictionary": lambda _: {},
    "a tensor": lambda _: torch.ones(6, 3),
    "an array": lambda _: np.ones((6, 3)),
    "fewer": lambda masks: masks[:-1],
    "more": lambda masks: [*masks, masks[0]],
    "Nones": each(lambda _: None),
    "lists": each(lambda mask: mask.tolist()),
    "longer": each(lambda mask: torch.ones(len(mask) + 1)),
    "2-d": each(lambda mask: mask[None]),
    "NaN": each(lambda mask: mask * NAN),
    "negative": each(lambda mask: -mask),
    "complex": each(lambda mask: mask.to(torch.complex64)),
    "meta": each(lambda mask: mask.to("meta")),
    "sparse": each(lambda mask: mask.to_sparse()),
}
NUMBERS: dict[str, Change] = {
    "None": lambda _: None,
    "a list": lambda x: x.tolist(),
    "a number": lambda _: 1,
    "an array": lambda x: x.detach().numpy(),
    "shorter": lambda x: x[:, :-1],
    "1-d": lambda x: x[0],
    "fewer rows": lambda x: x[:-1],
    "integers": lambda x: x.long(),
    "booleans": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
}
TOKEN_MASK = {name: change for name, change in NUMBERS.items() if name not in ("integers", "booleans")} | {
    "NaN": lambda x: x * NAN
}
INPUTS: dict[str, Change] = {
    "None": lambda _: None,
    "a tensor": lambda inputs: inputs["input_ids"],
    "empty": lambda _: {},
    "no mask": lambda inputs: {"input_ids": inputs["input_ids"]},
    "float ids": lambda inputs: inputs | {"input_ids": inputs["input_ids"].float()},
    "fewer rows": lambda inputs: {name: x[:3] for name, x in inputs.items()},
    "lists": lambda inputs: {name: x.tolist() for name, x in inputs.items()},
    "1-d": lambda inputs: {name: x[0] for name, x in inputs.items()},
    "beyond the vocabulary": lambda inputs: inputs | {"input_ids": inputs["input_ids"] + 1000},
    "another shape": lambda inputs: inputs | {"attention_mask": inputs["attention_mask"][:, :-1]},
    "NaN": lambda inputs: inputs | {"attention_mask": inputs["attention_mask"] * NAN},
    "meta": lambda inputs: {name: x.to("meta") for name, x in inputs.items()},
}
MODELS: dict[str, Change] = {
    "None": lambda _: None,
    "a name": lambda _: "gpt2",
    "a layer": lambda _: torch.nn.Linear(2, 2),
}
DICTIONARIES: dict[str, Change] = {"None": lambda _: None, "a number": lambda _: 1, "a list": lambda _: [None]}
COLUMNS: dict[str, Change] = {"None": lambda _: None, "a name": lambda _: "query"}

# What each argument of each door is tried with.
TABLE: dict[str, dict[str, dict[str, Change]]] = {
    "step": {"queries": ROWS, "responses": ROWS, "scores": SCORES, "response_masks": MASKS},
    "prepare_model_inputs": {"queries": ROWS, "responses": ROWS},
    "batched_forward_pass": {
        "model": MODELS,
        "queries": ROWS,
        "responses": ROWS,
        "model_inputs": INPUTS,
        "response_masks": MASKS,
    },
    "compute_rewards": {"scores": SCORES, "logprobs": NUMBERS, "ref_logprobs": NUMBERS, "masks": TOKEN_MASK},
    "compute_advantages": {"values": NUMBERS, "rewards": NUMBERS, "mask": TOKEN_MASK},
    **dict.fromkeys(
        ("loss", "train_minibatch"),
        dict.fromkeys(("old_logprobs", "values", "vpreds", "logprobs", "advantages", "returns"), NUMBERS)
        | {"mask": TOKEN_MASK, "logits": {name: change for name, change in NUMBERS.items() if name != "None"}},
    ),
    "record_step_stats": {
        "kl_coef": {"None": lambda _: None, "text": lambda _: "0.2"},
        **dict.fromkeys(("logprobs", "ref_logprobs", "non_score_reward"), NUMBERS),
        "masks": TOKEN_MASK,
        "queries": SIZED_ROWS,
        "responses": SIZED_ROWS,
        "scores": SCORES,
        "train_stats": DICTIONARIES,
    },
    "gather_stats": {"stats": DICTIONARIES},
    "log_stats": {
        "stats": DICTIONARIES,
        "batch": DICTIONARIES,
        "rewards": {name: change for name, change in SCORES.items() if name != "fewer"},
        "columns_to_log": COLUMNS,
    },
}
# Whose shape decides: a bad one is told of by the first of the others that does not fit it.
LIKE = {"logprobs": "expected .* like logprobs", "rewards": "like rewards", "non_score_reward": "like non_score_reward"}


def accepted() -> Iterator[tuple[str, str, Change]]:
    """(door, argument, change) that are taken on purpose."""
    numbers: list[Change] = [float, int, bool, lambda _: np.float32(1), lambda _: np.int64(2), lambda _: np.bool_(1)]
    tensors: list[Change] = [torch.Tensor.half, torch.Tensor.bool, lambda x: x[None], lambda x: x.requires_grad_()]
    for change in (*numbers, *tensors):
        yield "step", "scores", each(change)
        yield "compute_rewards", "scores", each(change)
    yield "step", "scores", tuple
    yield "compute_rewards", "scores", torch.stack
    yield "compute_rewards", "scores", lambda scores: torch.stack(scores).double().numpy()
    yield "log_stats", "rewards", torch.stack
    for dtype in (torch.bool, torch.uint8, torch.float16):
        yield "step", "response_masks", each(lambda mask, dtype=dtype: mask.to(dtype))
        yield "compute_rewards", "masks", lambda mask, dtype=dtype: mask.to(dtype)
    for argument in ("queries", "responses"):
        yield "step", argument, tuple
        yield "step", argument, each(torch.Tensor.int)
        yield "step", argument, each(lambda row: row.repeat(2)[::2])
    yield "loss", "logits", lambda _: None
    for argument in ("logprobs", "values", "advantages"):  # half precision is widened
        yield "loss", argument, torch.Tensor.half


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> PPOTrainer:
    return make_trainer(project_kwargs={"logging_dir": str(tmp_path_factory.mktemp("logs"))})


def good(trainer: PPOTrainer, door: str) -> Good:
    """Arguments that the door takes."""
    queries, responses, scores = make_batch()
    masks = [torch.ones(len(response)) for response in responses]
    rows: Good = {"queries": queries, "responses": responses}
    if door == "step":
        return rows | {"scores": scores, "response_masks": masks}
    if door == "log_stats":
        batch: Any = {"query": ["a"] * 6, "response": ["b"] * 6}
        return {"stats": {"a": 1.0}, "batch": batch, "rewards": scores, "columns_to_log": ["query"]}
    if door == "gather_stats":
        return {"stats": {"a": 1.0}}
    if door == "prepare_model_inputs":
        return rows
    forward: Good = rows | {"model": trainer.model, "model_inputs": trainer.prepare_model_inputs(queries, responses)}
    if door == "batched_forward_pass":
        return forward | {"response_masks": masks}
    logprobs, logits, vpreds, mask = trainer.batched_forward_pass(**forward, return_logits=True)
    assert vpreds is not None
    old, noise = logprobs.detach(), torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    if door == "compute_rewards":
        return {"scores": scores, "logprobs": old, "ref_logprobs": old, "masks": mask}
    if door == "compute_advantages":
        return {"values": vpreds.detach(), "rewards": noise, "mask": mask}
    losses: Good = {
        "old_logprobs": old,
        "values": vpreds.detach(),
        "vpreds": vpreds,
        "logprobs": logprobs,
        "mask": mask,
    }
    losses |= {"advantages": noise, "returns": noise, "logits": logits}
    if door in ("loss", "train_minibatch"):
        return losses
    data: Good = rows | {
        "scores": scores,
        "logprobs": old,
        "ref_logprobs": old,
        "non_score_reward": noise,
        "masks": mask,
    }
    return data | {"kl_coef": 0.2, "train_stats": stack_dicts([trainer.loss(**losses)[2]])}


CASES = [
    (door, argument, value)
    for door, arguments in TABLE.items()
    for argument, values in arguments.items()
    for value in values
]


@pytest.mark.parametrize(("door", "argument"), dict.fromkeys((door, argument) for door, argument, _ in CASES))
def test_bad_values_are_named_and_change_nothing(trainer: PPOTrainer, door: str, argument: str) -> None:
    weights = copy.deepcopy(trainer.model.state_dict())
    for value, change in TABLE[door][argument].items():
        arguments = good(trainer, door)
        arguments[argument] = change(arguments[argument])
        before = trainer.current_step
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(trainer, door)(**arguments)
        said = str(caught.value)
        named = rf"\b{argument}\b(?!_)|{LIKE.get(argument, argument)}"
        if argument in ("queries", "responses"):  # whose numbers of rows and of tokens are compared with the others'
            named += "|like queries|model_inputs.*marks"
        assert re.search(named, said), f"{value}: {said}"
        assert re.search("expected|needs|holds|is empty|gradient", said), f"{value}: {said}"
        assert trainer.current_step == before
        assert not trainer.optimizer.state
    assert all(torch.equal(weights[name], x) for name, x in trainer.model.state_dict().items())


def test_an_empty_response_is_not_told_to_start_the_prompt(trainer: PPOTrainer) -> None:
    queries, responses, scores = make_batch()
    with pytest.raises(ValueError, match=r"responses\[2\] is empty.*answers with its EOS") as caught:
        trainer.step(queries, [*responses[:2], responses[2][:0], *responses[3:]], scores)
    assert "prompt" not in str(caught.value)
    with pytest.raises(ValueError, match=r"queries\[0\] is empty.*start the prompt with a BOS"):
        trainer.step([queries[0][:0], *queries[1:]], responses, scores)


def test_a_minibatch_without_gradient_is_named(trainer: PPOTrainer) -> None:
    arguments = good(trainer, "train_minibatch")
    for name in ("logprobs", "vpreds"):
        arguments[name] = arguments[name].detach()
    with pytest.raises(ValueError, match=r"neither logprobs nor vpreds carries a gradient.*no_grad"):
        trainer.train_minibatch(**arguments)


def test_what_is_accepted_on_purpose() -> None:
    trainer = make_trainer(ppo_epochs=1, mini_batch_size=6, log_with=None)
    for door, argument, change in accepted():
        if door == "log_stats":
            continue  # writes files: below
        arguments = good(trainer, door)
        arguments[argument] = change(arguments[argument])
        getattr(trainer, door)(**arguments)


def test_rewards_for_the_log_may_be_a_tensor(trainer: PPOTrainer) -> None:
    arguments = good(trainer, "log_stats")
    arguments["rewards"] = torch.stack(arguments["rewards"])
    trainer.log_stats(**arguments)
    trainer.close()


def test_every_argument_has_its_bad_values() -> None:
    """A new argument of a door has to be tried here too."""
    import inspect

    known = {"return_kls", "return_logits", "data"}
    for door, arguments in TABLE.items():
        parameters = set(inspect.signature(getattr(PPOTrainer, door)).parameters) - {"self"} - known
        assert parameters <= set(arguments), door
