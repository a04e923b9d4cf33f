"""A model of which each of two ranks holds a part: what one process makes of the union, saved and taken up again.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

import ppo_runtime.trainer
from ppo_core.losses import PolicyLoss
from ppo_runtime import PPOTrainer, results
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.models.units import layers_of, sharding_plan
from ppo_runtime.ranks.sharded import Sharded
from ppo_runtime.ranks.shards import here, is_shard, whole
from ppo_runtime.ranks.world import world_from_environment
from tests.runtime.ranks import matrix
from tests.runtime.ranks.test_parallel import CASES, HALVED, SETTINGS, SHARES, assert_same_bits, spoil_second
from tests.runtime.ranks.test_refusals import assert_parted, called_alone
from tests.runtime.support.divided import need_divided_models
from tests.runtime.support.processes import run_ranks
from tests.runtime.support.tiny import tiny_config, tiny_lora, tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

SHARDED: dict[str, Any] = {"parallelism": "fsdp2", "max_grad_norm": 0.5}
SAME = (
    "tied embeddings",
    "t5",
    "lora",
    "checkpointing",
    "a parameter without gradient",
    "a parameter of one's own",
    "a minibatch without tokens",
    "a rank without tokens",
)


def stepped(trainer: PPOTrainer, rows: slice, *, seed: int = 0) -> dict[str, Any]:
    """Statistics and whole weights after a step."""
    stats = trainer.step(*(part[rows] for part in make_batch(seed=seed)))
    return {"stats": [untimed(stats)], "weights": whole_weights(trainer)}


def whole_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Of all ranks."""
    return {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def held(rank: int) -> dict[str, Any]:
    """What a rank holds of models and moments after a step, and what gradients are left to it."""
    trainer = make_trainer(**(HALVED | SHARDED))
    stepped(trainer, SHARES["half"][rank])
    assert trainer.ref_model is not None
    tensors = [*trainer.model.parameters(), *trainer.ref_model.parameters()]
    tensors += [x for state in trainer.optimizer.state.values() for x in state.values() if x.ndim]
    return {
        "traffic": trainer.parallel.traffic.bytes,
        "trained": sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad),
        "all": all(is_shard(x) for x in tensors),
        "share": sum(here(x).numel() for x in tensors) / sum(x.numel() for x in tensors),
    }


def ragged(trainer: PPOTrainer, rows: slice) -> dict[str, Any]:
    """A step in which it pays to read two of the last four rows end to end, but not all four, nor any others."""
    queries = [torch.arange(3, 3 + length) for length in (20, 20, 20, 20, 1, 20, 20, 20)]
    responses = [torch.arange(10, 14)] * 8
    stats = trainer.step(queries[rows], responses[rows], [torch.tensor(float(number)) for number in range(8)][rows])
    return {"stats": [untimed(stats)], "weights": whole_weights(trainer)}


def generated() -> list[int]:
    """Responses of a policy whose weights are gathered for it, by ranks that generate different numbers of them."""
    trainer = make_trainer(**(HALVED | SHARDED))
    prompts = [torch.tensor([5, 6, 7])] * (1 + 3 * trainer.world.rank)
    answers = trainer.generate(prompts, return_prompt=False, max_new_tokens=5, do_sample=False)
    return answers[0].tolist()


def pieces(rank: int) -> dict[str, Any]:
    """What TRL's forward pass says without gradient, and why it says nothing with one."""
    trainer = make_trainer(**(HALVED | SHARDED))
    queries, responses, _ = (part[SHARES["half"][rank]] for part in make_batch())
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)[0]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  looked at by the tests
        trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    return {"logprobs": logprobs, "said": str(caught.value)}


def failing(rank: int) -> dict[str, Any]:
    """A policy loss that fails on the second rank, then a whole step."""
    trainer = make_trainer(**(HALVED | SHARDED))
    objective = trainer.policy_objective

    def spoiled(*args: Any, **kwargs: Any) -> PolicyLoss:
        if rank == 1:
            raise ValueError("no such loss")
        return objective(*args, **kwargs)

    trainer.policy_objective = spoiled
    with pytest.raises((ValueError, RuntimeError)) as caught:
        stepped(trainer, SHARES["half"][rank])
    trainer.policy_objective = objective
    return stepped(trainer, SHARES["half"][rank]) | {"said": str(caught.value)}


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """A checkpoint after one step of two, taken up by a trainer of each kind; and the policy saved."""
    rows = SHARES["half"][rank]
    straight = make_trainer(**(HALVED | SHARDED))
    stepped(straight, rows)
    save_checkpoint(straight, folder / "checkpoint")
    straight.save_pretrained(folder / "model")
    found = {"saved": whole_weights(straight), "straight": stepped(straight, rows, seed=1)}
    for name, settings in {"again": SHARDED, "ddp": SHARDED | {"parallelism": "ddp"}}.items():
        trainer = make_trainer(**(HALVED | settings))
        load_checkpoint(trainer, folder / "checkpoint")
        found[name] = stepped(trainer, rows, seed=1)
    return found


def uploaded(folder: Path) -> list[str]:
    """The names of what is uploaded, by either door, where the hub is a list."""
    trainer, seen = make_trainer(**(HALVED | SHARDED)), []

    def upload(save: Any, repo_id: str, **_: Any) -> None:
        save(folder / repo_id)
        seen.extend(sorted(path.name for path in (folder / repo_id).glob("*.safetensors")))

    with mock.patch.object(ppo_runtime.trainer, "upload", upload):
        trainer.push_to_hub("mine")
        trainer.save_pretrained(folder / "here", push_to_hub=True, repo_id="again")
    return seen


def saved_broken(rank: int, folder: Path) -> bool:
    """Whether it is said that the second rank's part of what is saved is not finite."""
    trainer = make_trainer(**(HALVED | SHARDED))
    if rank == 1:
        here(next(p for p in trainer.model.parameters() if p.requires_grad)).fill_(torch.nan)
    with mock.patch.object(results.logger, "warning") as said:
        results.save_results(trainer, folder / "broken", steps=1, changed=True)
    return any("holds weights that are not finite" in call.args[0] for call in said.call_args_list)


def refused() -> dict[str, str]:
    """What can't be divided."""
    said = {}
    for name, make in {
        "shared layers": lambda: make_trainer(**(HALVED | SHARDED), num_shared_layers=1),
        "another reference": lambda: setattr(make_trainer(**(HALVED | SHARDED)), "ref_model", tiny_model("llama")),
        "an optimiser that has stepped": lambda: make_trainer(**(HALVED | SHARDED), optimizer_of=stepped_optimizer),
    }.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011  looked at by the tests
            make()
        said[name] = str(caught.value)
    return said


def refused_and_mended(rank: int) -> dict[str, Any]:
    """What a trainer or a step refuses before models are divided or passed through, and the same mended."""
    undivided, said = make_trainer(**(HALVED | SHARDED | {"parallelism": "ddp"})), {}
    model, config = undivided.model, attrs.evolve(undivided.config, parallelism="fsdp2")
    with pytest.raises(ValueError) as short:  # noqa: PT011  looked at by the tests
        PPOTrainer(config, model, None, tiny_tokenizer(), dataset=[])
    trainer = PPOTrainer(config, model, None, tiny_tokenizer())
    trainer.optimizer.param_groups[0]["eps"] = SETTINGS["adam_eps"]
    for name, parts in {"model": (model, None), "ref_model": (make_trainer().model, trainer.ref_model)}.items():
        with pytest.raises(ValueError) as again:  # noqa: PT011  looked at by the tests
            PPOTrainer(config, *parts, tiny_tokenizer())
        said[name] = str(again.value)
    model.pretrained_model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError) as reentrant:  # noqa: PT011  looked at by the tests
        stepped(trainer, SHARES["half"][rank])
    model.pretrained_model.gradient_checkpointing_enable({"use_reentrant": False})
    said |= {"dataset": str(short.value), "reentrant": str(reentrant.value)}
    return {"said": said, "weights": stepped(trainer, SHARES["half"][rank])["weights"]}


def on_the_model(folder: Path) -> dict[str, str]:
    """What the model itself says of calls that need all of it, as old scripts have them on one rank."""
    model, said = make_trainer(**(HALVED | SHARDED)).model, {}
    ids = torch.tensor([[5, 6, 7]])
    for name, call in {
        "batched_forward_pass": lambda: model(ids),
        "generate": lambda: model.generate(input_ids=ids, max_new_tokens=2),
        "save_pretrained": lambda: model.save_pretrained(folder / "of one rank"),
    }.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011  looked at by the tests
            call()
        said[name] = str(caught.value)
    return said


def own_optimizer(rank: int) -> dict[str, Any]:
    """Made by the user, of the parameters that the model had before."""
    trainer = make_trainer(**(HALVED | SHARDED), optimizer_of=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    return stepped(trainer, SHARES["half"][rank])


def stepped_optimizer(model: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = world_from_environment().rank
    found: dict[str, Any] = {name: CASES[name](SHARES["half"][rank], SHARDED) for name in SAME}
    found["unequal"] = CASES["llama"](SHARES["unequal"][rank], SHARDED)
    found["skipping"] = spoil_second(SHARDED)
    found |= {"held": held(rank), "generated": generated(), "failing": failing(rank), "own": own_optimizer(rank)}
    found["ragged"] = ragged(make_trainer(**(HALVED | SHARDED)), slice(4 * rank, 4 * rank + 4))
    found |= {
        "resumed": resumed(rank, folder),
        "on the model": on_the_model(folder),
        "pieces": pieces(rank),
        "uploaded": uploaded(folder),
        "refused": refused(),
        "mended": refused_and_mended(rank),
        "saved broken": saved_broken(rank, folder),
        "alone": {case.__name__: called_alone(case, rank, "fsdp2", folder) for case in matrix.CALLED_ALONE},
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What both ranks did."""
    need_divided_models()
    return run_ranks(__file__, folder, warnings="default")


@pytest.mark.parametrize("name", [*SAME, "unequal"])
def test_two_ranks_do_what_one_does_with_all_rows(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert_same_bits(first, second)
    alone = CASES["llama" if name == "unequal" else name](slice(None), {"max_grad_norm": 0.5})
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first["stats"], alone["stats"], rtol=1e-4, atol=1e-5)


def test_one_rank_may_read_its_rows_end_to_end_and_another_not(ranks: list[dict[str, Any]]) -> None:
    """Whether a model keeps such rows apart is tried while it is whole, not by one rank between the passes of all."""
    alone = make_trainer(**(SETTINGS | {"max_grad_norm": 0.5, "batch_size": 8, "gradient_accumulation_steps": 4}))
    expected = ragged(alone, slice(None))
    for rank in ranks:
        torch.testing.assert_close(rank["ragged"]["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


def test_each_rank_holds_half_of_models_and_moments(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["held"]["all"]
        assert rank["held"]["share"] == pytest.approx(0.5, abs=0.01)


def test_gradients_are_sent_once_in_every_minibatch(ranks: list[dict[str, Any]]) -> None:
    """Two updates of two, however many rows each rank has in them."""
    assert [rank["held"]["traffic"] for rank in ranks] == [4 * rank["held"]["trained"] for rank in ranks]


def test_pieces_make_passes_without_gradient(ranks: list[dict[str, Any]]) -> None:
    trainer = make_trainer(**SETTINGS)
    queries, responses, _ = (part[SHARES["half"][0]] for part in make_batch())
    inputs = trainer.prepare_model_inputs(queries, responses)
    expected = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)[0]
    torch.testing.assert_close(ranks[0]["pieces"]["logprobs"], expected.detach())
    assert "step() alone makes passes with gradient" in ranks[0]["pieces"]["said"]


def test_an_update_that_is_left_out_leaves_the_others_as_they_are(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["skipping"] for rank in ranks)
    assert first["skipped"] == second["skipped"] == 1
    assert_same_bits(first, second)
    assert all(x.isfinite().all() for x in first["weights"].values())


def test_ranks_generate_as_many_responses_as_each_likes(ranks: list[dict[str, Any]]) -> None:
    trainer = make_trainer()
    answer = trainer.generate(torch.tensor([5, 6, 7]), return_prompt=False, max_new_tokens=5, do_sample=False)[0]
    assert ranks[0]["generated"] == ranks[1]["generated"] == answer.tolist()


def test_a_loss_that_one_rank_cannot_make_ends_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    """And the next one is as if nothing had been."""
    alone = make_trainer(**(SETTINGS | {"max_grad_norm": 0.5}))
    expected = stepped(alone, slice(None))
    for rank in ranks:
        torch.testing.assert_close(rank["failing"]["weights"], expected["weights"], rtol=1e-5, atol=1e-5)
    assert "no such loss" in ranks[1]["failing"]["said"]


def test_an_optimiser_of_ones_own_steps_the_parts(ranks: list[dict[str, Any]]) -> None:
    settings: dict[str, Any] = SETTINGS | {"max_grad_norm": 0.5}
    alone = make_trainer(**settings, optimizer_of=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    expected = stepped(alone, slice(None))
    torch.testing.assert_close(ranks[0]["own"]["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_goes_on_in_parts_and_whole(ranks: list[dict[str, Any]]) -> None:
    """Bit for bit with the same way of sharing; to rounding with the other."""
    for rank in ranks:
        found = rank["resumed"]
        assert_same_bits(found["again"], found["straight"])
        torch.testing.assert_close(found["ddp"]["weights"], found["straight"]["weights"], rtol=1e-5, atol=1e-5)


def test_the_model_is_saved_whole(ranks: list[dict[str, Any]], folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    for name, x in ranks[0]["resumed"]["saved"].items():
        inner = name.removeprefix("pretrained_model.")
        assert inner.startswith("v_head.") or torch.equal(loaded[inner], x), name


def test_weights_that_are_not_finite_are_found_in_any_part(ranks: list[dict[str, Any]]) -> None:
    assert [rank["saved broken"] for rank in ranks] == [True, False]


def test_the_whole_model_is_uploaded_by_one_rank(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["uploaded"] == 2 * ["model.safetensors", "value_head.safetensors"]
    assert ranks[1]["uploaded"] == []


def test_what_cannot_be_divided_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    said = ranks[0]["refused"]
    assert said == ranks[1]["refused"]
    assert "share" in said["shared layers"]
    assert "leave num_shared_layers out" in said["shared layers"]
    assert "make a new trainer" in said["another reference"]
    assert "optimizer has stepped already" in said["an optimiser that has stepped"]


def test_what_is_refused_in_time_can_be_mended(ranks: list[dict[str, Any]]) -> None:
    """With the same model, which has not been divided for it, and in the next step."""
    expected = stepped(make_trainer(**(SETTINGS | {"max_grad_norm": 0.5})), slice(None))["weights"]
    for rank in ranks:
        said = rank["mended"]["said"]
        assert "dataset has no rows" in said["dataset"]
        for name in ("model", "ref_model"):
            assert said[name].startswith(f"{name} has been divided among the ranks already")
        assert "is re-entrant" in said["reentrant"]
        torch.testing.assert_close(rank["mended"]["weights"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", matrix.COLLECTIVES | matrix.WHERE_DIVIDED)
def test_what_one_rank_alone_calls_is_told_on_both(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (rank["alone"][f"{case}_alone"] for rank in ranks)
    assert first == second
    assert_parted(first)


@pytest.mark.parametrize(
    ("family", "count"), [("gpt2", 2), ("llama", 2), ("opt", 2), ("t5", 4), ("bart", 4), ("longt5", 4)]
)
def test_layers_of_all_stacks_are_found(family: str, count: int) -> None:
    found = layers_of(tiny_model(family))
    assert len(found) == count
    assert len({type(layer) for layer in found}) <= 2


def test_layers_are_found_below_an_adapter() -> None:
    trainer = make_trainer(peft_config=tiny_lora("llama"))
    assert len(layers_of(trainer.model)) == 2


def test_a_plan_counts_every_weight_once() -> None:
    """Of a model that holds no numbers as well."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    plan = sharding_plan(model)
    assert [unit.name for unit in plan] == ["transformer.h.0", "transformer.h.1", ""]
    assert sum(unit.parameters for unit in plan) == sum(p.numel() for p in tiny_model("gpt2").parameters())
    assert sum(unit.bytes for unit in plan) == 4 * sum(unit.parameters for unit in plan)
    model.requires_grad_(False)
    assert sum(unit.trained for unit in sharding_plan(model)) == 0


def test_a_torch_that_cannot_take_up_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    with pytest.raises(ValueError, match=r"install torch 2\.13 or later, or set parallelism='ddp'"):
        Sharded(tiny_model("llama"), world_from_environment(), [])


def test_a_world_of_one_is_not_divided() -> None:
    trainer = make_trainer(parallelism="fsdp2")
    assert not trainer.parallel.sharded
    trainer.step(*make_batch())


@pytest.mark.parametrize("call", ["batched_forward_pass", "generate", "save_pretrained"])
def test_a_divided_model_says_whom_to_ask(ranks: list[dict[str, Any]], call: str) -> None:
    for rank in ranks:
        assert re.match(
            rf"the model is divided among ranks.*call the trainer's .*{call} on every", rank["on the model"][call]
        )


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
