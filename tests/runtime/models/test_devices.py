"""Rows come from any device, models stay where they are: tested without a second one.

The meta device is one for what is refused by name; for what has to work, :mod:`tests.runtime.devices.pretend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ppo_core.averages import Average
from ppo_core.moments import Moments
from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.compat.stats import TOKENS, gather_stats
from ppo_runtime.ranks import agreement
from ppo_runtime.ranks import gather as distributed
from ppo_runtime.ranks.gather import Maximum, gather_averages, merge_moments
from ppo_runtime.ranks.world import World
from tests.runtime.devices.pretend import Pretended, pretending
from tests.runtime.learning.test_guards import snapshot
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer, untimed


def away(rows: list[Tensor]) -> list[Tensor]:
    return [Pretended(row) for row in rows]


@pytest.mark.parametrize("moved", ["queries", "responses", "scores", "response_masks", "all"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_rows_of_a_step_may_be_on_any_device(family: str, moved: str) -> None:
    queries, responses, scores = make_batch()
    masks = [torch.ones(len(response)) for response in responses]
    batch = {"queries": queries, "responses": responses, "scores": scores, "response_masks": masks}
    expected = make_trainer(family, ppo_epochs=1).step(**batch)
    trainer = make_trainer(family, ppo_epochs=1)
    with pretending():
        found = trainer.step(**{n: away(x) if moved in (n, "all") else x for n, x in batch.items()})
    torch.testing.assert_close(untimed(found), untimed(expected), rtol=1e-5, atol=1e-6)
    assert all(type(x) is not Pretended for x in snapshot(trainer)["optimizer"])


@pytest.mark.parametrize("moved", ["queries", "responses"])
def test_rows_of_the_pieces_may_be_on_any_device(moved: str) -> None:
    trainer = make_trainer()
    queries, responses, _ = make_batch()
    rows = {"queries": queries, "responses": responses}
    rows[moved] = away(rows[moved])
    with pretending():
        found = trainer.prepare_model_inputs(**rows)
        torch.testing.assert_close(found, trainer.prepare_model_inputs(queries, responses))
        trainer.batched_forward_pass(trainer.model, rows["queries"], rows["responses"], found)


GATHERED: dict[str, Callable[[Callable[[float], Tensor]], Any]] = {
    "averages": lambda at: gather_averages({"a": Average(at(6.0), at(3.0)), "b": Maximum(at(2.0))}, World(0, 2)),
    "moments": lambda at: merge_moments(Moments(at(3.0), at(1.0), at(2.0)), World(0, 2)),
    "statistics": lambda at: gather_stats({"a": at(2.0), TOKENS: at(3.0)}, World(0, 2)),
}


@pytest.mark.parametrize("what", GATHERED)
def test_numbers_are_widened_where_there_is_float64(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (distributed, agreement):
        monkeypatch.setattr(module, "gathered", lambda vector, world, phase: torch.stack([vector] * world.size))
    expected = GATHERED[what](torch.tensor)
    with pretending(float64=False):
        found = GATHERED[what](lambda number: Pretended(torch.tensor(number)))
        with pytest.raises(TypeError, match="no float64"):
            Pretended(torch.ones(1)).double()
    for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert float(ours) == float(theirs)


def test_a_model_elsewhere_than_the_other_or_than_itself_is_named() -> None:
    def trainer(model: Any, ref_model: Any) -> PPOTrainer:
        config = PPOConfig(batch_size=6, mini_batch_size=2, accel="eager")
        return PPOTrainer(config, model, ref_model, tiny_tokenizer())

    def policy() -> Any:
        return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))

    with pytest.raises(ValueError, match="ref_model has parameters on the meta device"):
        trainer(policy(), tiny_model("llama", seed=1).to("meta"))
    half_there = policy()
    half_there.v_head.to("meta")
    with pytest.raises(ValueError, match="model has parameters on the meta device"):
        trainer(half_there, None)


def test_several_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between devices that this machine may not have, by their names alone."""
    from ppo_runtime.models import devices

    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    places = {id(model): ["cuda:0"], id(reference): ["cpu"]}
    monkeypatch.setattr(devices, "_devices", lambda one: places[id(one)])
    with pytest.raises(ValueError, match=r"ref_model is on cpu, expected cuda:0 like model.*ref_model\.to\('cuda:0'\)"):
        devices.check_devices(model, reference)
    places[id(reference)] = ["cuda:0"]
    devices.check_devices(model, reference)
    places[id(model)] = ["cpu", "cuda:0"]
    with pytest.raises(ValueError, match="model has parameters on cpu and cuda:0, expected one device"):
        devices.check_devices(model, None)
    model.hf_device_map = {"model": "cpu", "lm_head": 0}
    devices.check_devices(model, reference)
