"""Attributes of a trainer that scripts for TRL ask for, without accelerate."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_runtime.compat.accelerator import Accelerator
from ppo_runtime.ranks.world import World, world_from_environment
from tests.runtime.support.processes import run_ranks
from tests.runtime.support.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer


def test_what_scripts_ask_the_accelerator_for(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    accelerator = trainer.accelerator
    assert accelerator.device == trainer.device == trainer.current_device == trainer.model.current_device
    assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (1, 0, 0)
    assert accelerator.is_main_process
    assert accelerator.is_local_main_process
    assert accelerator.is_last_process
    assert accelerator.state.deepspeed_plugin is None
    assert accelerator.unwrap_model(trainer.model) is trainer.model
    assert accelerator.prepare(trainer.model) is trainer.model
    pair = (trainer.model, trainer.optimizer)
    assert accelerator.prepare(*pair) == pair
    accelerator.wait_for_everyone()
    accelerator.print("hello", end="!")
    with accelerator.main_process_first():
        pass
    assert capsys.readouterr().out == "hello!"


def test_what_the_accelerator_lacks_is_an_attribute_error_that_says_so() -> None:
    accelerator = make_trainer().accelerator
    assert not hasattr(accelerator, "backward")
    with pytest.raises(AttributeError, match=r"trainer\.accelerator has no 'backward': there is no accelerate"):
        accelerator.backward  # noqa: B018  # reading is the test


@pytest.mark.parametrize(("given", "expected"), [("", 0), ("0", 0), ("3", 3), (None, 0)])
def test_the_number_on_this_machine(given: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if given is not None:
        monkeypatch.setenv("LOCAL_RANK", given)
    accelerator = make_trainer().accelerator
    assert (accelerator.local_process_index, accelerator.is_local_main_process) == (expected, expected == 0)


@pytest.mark.parametrize("given", ["two", "-1", "1.5"])
def test_a_number_on_this_machine_that_is_none_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", given)
    with pytest.raises(ValueError, match=f"LOCAL_RANK is '{given}' in the environment, expected the number of this"):
        _ = make_trainer().accelerator


@pytest.mark.parametrize("gather", ["gather", "gather_for_metrics"])
def test_gathering_in_a_world_of_one(gather: str) -> None:
    accelerator = make_trainer().accelerator
    x = torch.arange(6.0).reshape(2, 3)
    found = getattr(accelerator, gather)({"a": x, "b": [torch.tensor(1.0), (x[0],)]})
    assert torch.equal(found["a"], x)
    assert found["b"][0].tolist() == [1.0]
    assert torch.equal(found["b"][1][0], x[0])
    with pytest.raises(TypeError, match="gather got a float, expected tensors"):
        accelerator.gather(1.0)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_gathering_keeps_kinds_and_shapes() -> None:
    gather = make_trainer().accelerator.gather
    found = gather(Pair(torch.ones(2), torch.zeros(1)))
    assert isinstance(found, Pair)
    assert torch.equal(found.first, torch.ones(2))
    for shape in ((3, 0), (0,), (0, 4), (2, 0, 3), (2, 3, 1)):
        assert gather(torch.ones(shape)).shape == shape


def test_a_second_rank_is_silent_and_not_first(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = Accelerator(torch.device("cpu"), World(rank=1, size=2))
    accelerator.print("hello")
    assert capsys.readouterr().out == ""
    assert not accelerator.is_main_process
    assert accelerator.is_last_process
    assert accelerator.num_processes == 2


def test_what_a_trainer_knows_of_its_model() -> None:
    plain, encoder_decoder = make_trainer(), make_trainer("t5")
    assert (plain.is_encoder_decoder, encoder_decoder.is_encoder_decoder) == (False, True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=tiny_lora("llama"))
    adapter = PPOTrainer(PPOConfig(batch_size=2, accel="eager"), model, None, tiny_tokenizer())
    assert (plain.is_peft_model, adapter.is_peft_model) == (False, True)
    assert not plain.is_distributed


def test_running_moments_of_the_scores() -> None:
    trainer = make_trainer(use_score_scaling=True)
    assert trainer.running.count == 0
    scores: Any = make_batch()[2]
    trainer.step(*make_batch())
    seen = torch.stack(scores)
    assert trainer.running.count == 6
    assert trainer.running.mean == pytest.approx(seen.mean().item(), rel=1e-5)
    assert trainer.running.std == pytest.approx(seen.std().item(), rel=1e-5)
    assert trainer.running.var == pytest.approx(seen.var().item(), rel=1e-5)


def _as_a_rank(folder: Path) -> None:
    world = world_from_environment()
    accelerator = Accelerator(torch.device("cpu"), world)
    rank = float(world.rank)
    with accelerator.main_process_first():
        (folder / f"was-here-{world.rank}").touch()
        others = len(list(folder.glob("was-here-*")))
    gathered = accelerator.gather(
        {"rows": torch.full((world.rank + 1, 2), rank), "number": torch.tensor(rank), "none": torch.ones(2, 0)}
    )
    several = {"a": torch.tensor([rank]), "b": torch.tensor([10 + rank])}
    ordered = accelerator.gather(several if rank else dict(reversed(several.items())))
    said = []
    for first, second in (
        (several, {"a": several["a"]}),
        ([several["a"]], [several["a"]] * 2),
        (several["a"], several["a"].long()),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (several["a"], 1.0),
    ):
        with pytest.raises((ValueError, TypeError)) as refused:
            accelerator.gather(second if rank else first)
        said.append(str(refused.value))
    accelerator.wait_for_everyone()
    torch.save({"gathered": gathered, "others": others, "ordered": ordered, "said": said}, folder / f"{world.rank}.pt")


def test_two_ranks_gather(tmp_path: Path) -> None:
    results = run_ranks(__file__, tmp_path)
    for result in results:
        assert result["gathered"]["rows"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert result["gathered"]["number"].tolist() == [0.0, 1.0]
        assert result["gathered"]["none"].shape == (4, 0)
    assert [result["others"] for result in results] == [1, 2]
    assert [[*result["ordered"]] for result in results] == [["b", "a"], ["a", "b"]]
    for result in results:
        assert {key: x.tolist() for key, x in result["ordered"].items()} == {"a": [0.0, 1.0], "b": [10.0, 11.0]}
    missing, entries, dtype, shape, kind = results[0]["said"]
    assert results[1]["said"] == results[0]["said"]
    assert "the kind of tensor['b'] is 'torch.float32, rows of shape ()' on rank 0 and absent on rank 1" in missing
    assert "the number of entries of tensor is '1' on rank 0 and '2' on rank 1" in entries
    assert "the kind of tensor is 'torch.float32, rows of shape ()' on rank 0 and 'torch.int64, " in dtype
    assert "rows of shape (3,)' on rank 0 and 'torch.float32, rows of shape (2,)' on rank 1" in shape
    assert kind == "rank 1: gather got a float, expected tensors, or lists and dictionaries of them"


if __name__ == "__main__":
    _as_a_rank(Path(sys.argv[1]))
