"""How often the host waits for the device: so many times per step, update and minibatch, whatever their size.

Each wait lets the device run dry: nothing is there to do when it goes on. Some are due (whether a gradient is finite
decides what is done next), none may come once per row, token, layer or parameter.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from ppo_runtime import PPOTrainer
from ppo_runtime.learning import forward
from tests.runtime.devices.pretend import DEVICE, Wait, pretending
from tests.runtime.devices.test_walk import trainer_of
from tests.runtime.support.trainers import make_batch

pytestmark = pytest.mark.usefixtures("torchs_layer_norm")

OURS = ("ppo_core", "ppo_runtime")


class Budget(NamedTuple):
    """The waits that this library's own code asks for."""

    step: int
    """Rows and scores to the host to be looked at 2, laid out to the device 5, kept tokens of every update 1; for the
    passes without gradient 2 indices, and of policy and reference each what a minibatch has below; scores to the device
    1, what the refusals see 1, moments of the advantages 1; of the statistics 3 masked distributions, then all numbers
    1 and all distributions 1."""
    minibatch: int
    """Its index, for rows and for targets, 2; which tokens are kept, for hidden states and for tokens, 2."""
    update: int = 2
    """Its losses, and the norm of its gradient: both decide whether it counts."""

    def of(self, updates: int, minibatches: int) -> int:
        """Of a whole step."""
        return self.step + updates * self.update + minibatches * self.minibatch


# An encoder-decoder has one tensor more to lay out. Rows end to end are picked from padded ones, in each pass. Which
# layers below a LoRA policy's lowest adapter are frozen is tried anew in every step.
PADDED, SEQ2SEQ, PACKED = Budget(step=23, minibatch=4), Budget(step=24, minibatch=4), Budget(step=25, minibatch=5)


def on_device(rows: list[Tensor]) -> list[Tensor]:
    return [row.to(DEVICE) for row in rows]


def waits_of_a_step(policy: str, *, size: int = 4, times: int = 1, **settings: Any) -> list[Wait]:
    """Of the second step: in the first, a model is tried. All that ``step`` is given lies on the device."""
    queries, responses, scores = make_batch(size)
    responses = [row.repeat(times) for row in responses]
    with pretending() as waits:
        trainer = trainer_of(policy, away=True, batch_size=size, **settings)
        for _ in range(2):
            waits.clear()
            trainer.step(on_device(queries), on_device(responses), on_device(scores))
            found = [wait for wait in waits if wait.package]  # without this test's own
    return found


def ours(waits: list[Wait]) -> int:
    return sum(wait.package in OURS for wait in waits)


@pytest.mark.parametrize(
    ("policy", "packs", "budget"),
    [("llama", False, PADDED), ("llama", True, PACKED), ("t5", False, SEQ2SEQ)],
)
@pytest.mark.parametrize(
    ("settings", "updates", "minibatches"),
    [
        ({"mini_batch_size": 4}, 1, 1),
        ({"mini_batch_size": 2, "gradient_accumulation_steps": 2}, 1, 2),
        ({"mini_batch_size": 2, "ppo_epochs": 2}, 4, 4),
    ],
)
def test_a_step_waits_as_often_as_its_budget_says(
    policy: str,
    packs: bool,
    budget: Budget,
    settings: dict[str, Any],
    updates: int,
    minibatches: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "packing_pays", lambda *_: packs)
    found = waits_of_a_step(policy, **settings)
    counted = Counter(f"{wait.site} {wait.why}" for wait in found if wait.package in OURS)
    assert ours(found) == budget.of(updates, minibatches), sorted(counted.items())


@pytest.mark.parametrize(("policy", "packs"), [("llama", False), ("llama", True), ("t5", False), ("llama+lora", False)])
def test_waits_do_not_grow_with_rows_tokens_or_layers(
    policy: str, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own included: one look at each mask."""
    monkeypatch.setattr(forward, "packing_pays", lambda *_: packs)

    def counted(**settings: Any) -> int:
        return len(waits_of_a_step(policy, **({"mini_batch_size": 4} | settings)))

    assert counted(size=8, mini_batch_size=8, times=3, layers=4) == counted()


ROLLOUT = 9
"""Prompts to the device 1, to the host to find equal ones 1, and which are read 1; uniform numbers 1; the ids that end
a row, for the criterion 1 and to forbid them 1; whether all scores were numbers 1; where rows ended 1, and what they
are, to be looked at 1."""


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize(("rows", "layers"), [(2, 2), (6, 4)])
def test_a_rollout_waits_once_for_every_token(length: int, rows: int, layers: int) -> None:
    """To leave rows that are over out of the batch; and as often again in transformers."""
    queries, _, _ = make_batch(rows)
    with pretending() as waits:
        trainer: PPOTrainer = trainer_of("llama", away=True, layers=layers)
        for _ in range(2):
            waits.clear()
            found = trainer.generate(
                queries, return_prompt=False, do_sample=True, top_k=0, min_new_tokens=length, max_new_tokens=length
            )
        assert [len(row) for row in found] == [length] * rows
    assert ours(waits) == ROLLOUT + length
    assert len(waits) - ours(waits) <= 2 * length + 2


def test_a_wait_that_comes_once_per_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget can fail."""
    select = forward.Rows.select

    def slow(rows: forward.Rows, index: Tensor) -> forward.Rows:
        assert all(int(length) for length in rows.attention_mask.sum(-1))
        return select(rows, index)

    monkeypatch.setattr(forward, "packing_pays", lambda *_: False)
    monkeypatch.setattr(forward.Rows, "select", slow)
    # Once for the passes without gradient, and for each minibatch.
    assert ours(waits_of_a_step("llama", mini_batch_size=2)) == PADDED.of(2, 2) + 3 * 4
