"""Updates on two ranks by torch's DistributedDataParallel: what one process makes of the union, and no trap in between.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ppo_core.losses import PolicyLoss
from ppo_runtime import PPOTrainer
from ppo_runtime.learning import update
from ppo_runtime.ranks.parallel import Alone, Replicated
from ppo_runtime.ranks.shards import whole
from ppo_runtime.ranks.world import world_from_environment
from tests.runtime.support.processes import ROOT, run_ranks
from tests.runtime.support.tiny import tiny_lora
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

# Rows of six in one process; of two, each has its share.
SHARES = {"half": (slice(0, 3), slice(3, 6)), "unequal": (slice(0, 4), slice(4, 6))}
# All of a rank's rows in every update, in minibatches of at most two.
SETTINGS: dict[str, Any] = {
    "batch_size": 6,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "ppo_epochs": 2,
    "drop_last": False,
    "adam_eps": 1e-4,
}

# Half of them: two minibatches in every update.
HALVED: dict[str, Any] = SETTINGS | {"batch_size": 4, "gradient_accumulation_steps": 2}


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Those that train, under names."""
    named = [*trainer.model.named_parameters(), *(("shift", one) for one in getattr(trainer.model, "shift", []))]
    return {name: whole(p).detach().clone() for name, p in named if p.requires_grad}


def stepped(trainer: PPOTrainer, rows: slice, *, empty: slice | None = None, count: int = 2) -> dict[str, Any]:
    """Statistics and weights after steps on some of six rows, of which some may have no token that counts."""
    history = []
    for seed in range(count):
        queries, responses, scores = make_batch(seed=seed)
        masks = [torch.ones(len(response)) for response in responses]
        for mask in [] if empty is None else masks[empty]:
            mask.zero_()
        history.append(untimed(trainer.step(queries[rows], responses[rows], scores[rows], masks[rows])))
    return {"stats": history, "weights": weights_of(trainer)}


def checkpointed(trainer: PPOTrainer, *, reentrant: bool) -> PPOTrainer:
    """With activations recomputed in backward passes."""
    trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return trainer


def unread(trainer: PPOTrainer) -> PPOTrainer:
    """With a parameter that trains, is the optimiser's, and is in no pass."""
    trainer.model.unread = nn.Parameter(torch.ones(3))
    trainer.optimizer.add_param_group({"params": [trainer.model.unread], "weight_decay": 0.5})
    return trainer


def growing(trainer: PPOTrainer, rows: slice) -> dict[str, Any]:
    """A step in which the embeddings don't train, and one in which they do."""
    embeddings = trainer.model.pretrained_model.get_input_embeddings().weight.requires_grad_(False)
    first = stepped(trainer, rows, count=1)
    embeddings.requires_grad_(True)
    second = stepped(trainer, rows, count=1)
    return {"stats": first["stats"] + second["stats"], "weights": second["weights"]}


def pieces(trainer: PPOTrainer, rows: slice) -> dict[str, Any]:
    """An update by TRL's methods, one by one."""
    queries, responses, _ = (part[rows] for part in make_batch())
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        old, _, values, masks = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    assert values is not None
    stats = []
    for _ in range(2):
        now, _, predicted, _ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        assert predicted is not None
        advantages = old.detach().sin() + 0.5
        found = trainer.train_minibatch(old, values, now, None, predicted, masks, advantages, values + 1)
        stats.append({"tokens": float(found["minibatch/tokens"])})
    return {"stats": stats, "weights": weights_of(trainer)}


def of_ones_own(trainer: PPOTrainer) -> PPOTrainer:
    """With a parameter beside the model's, of the policy's loss, which is kept where weights are looked for."""
    objective, shift = trainer.policy_objective, nn.Parameter(torch.zeros(()))

    def shifted(logprobs: torch.Tensor, *rest: Any, **more: Any) -> PolicyLoss:
        return objective(logprobs + shift, *rest, **more)

    trainer.policy_objective = shifted
    trainer.optimizer.add_param_group({"params": [shift], "eps": SETTINGS["adam_eps"]})
    trainer.model.shift = [shift]
    return trainer


Case = Callable[..., dict[str, Any]]
"""Of rows, and of settings beside the case's own."""


def case(family: str = "llama", *, change: Callable[..., PPOTrainer] | None = None, **settings: Any) -> Case:
    """Two steps of a trainer."""
    empty = settings.pop("empty", None)

    def run(rows: slice, more: dict[str, Any] | None = None) -> dict[str, Any]:
        lora = settings.get("peft_config")
        given = settings | (more or {}) | ({"peft_config": tiny_lora(family)} if lora else {})
        trainer = make_trainer(family, **(SETTINGS | given))
        return stepped(trainer if change is None else change(trainer), rows, empty=empty)

    return run


CASES: dict[str, Case] = {
    "llama": case(),
    "tied embeddings": case("gpt2"),
    "t5": case("t5"),
    "lora": case(peft_config=True),
    "lora of an encoder-decoder": case("t5", peft_config=True),
    "checkpointing": case(change=partial(checkpointed, reentrant=False)),
    "re-entrant checkpointing": case(change=partial(checkpointed, reentrant=True)),
    "shared bottom": case(num_shared_layers=1),
    "a parameter without gradient": case(change=unread),
    "a parameter of one's own": case(change=of_ones_own),
    "a minibatch without tokens": case(empty=slice(3, 5)),
    "a rank without tokens": case(empty=slice(3, 6)),
    "other parameters train": lambda rows: growing(make_trainer(**SETTINGS), rows),
    "pieces": lambda rows: pieces(
        make_trainer(**(SETTINGS | {"mini_batch_size": 6, "gradient_accumulation_steps": 1})), rows
    ),
}


def failing() -> dict[str, Any]:
    """A policy loss that fails on the second rank, in the last minibatch of an update; then a whole step."""
    trainer = make_trainer(**(HALVED))
    rank, objective, calls = trainer.world.rank, trainer.policy_objective, 0

    def spoiled(*args: Any, **kwargs: Any) -> PolicyLoss:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise ValueError("no such loss")
        return objective(*args, **kwargs)

    trainer.policy_objective = spoiled
    rows = SHARES["half"][rank]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        stepped(trainer, rows, count=1)
    trainer.policy_objective = objective
    return stepped(trainer, rows, count=1) | {"said": str(caught.value), "calls": calls}


def spoil_second(more: dict[str, Any]) -> dict[str, Any]:
    """An update that is left out because of the second rank, between others of the same step."""
    trainer = make_trainer(**(HALVED | {"ppo_epochs": 3} | more))
    rank, minibatch, calls = trainer.world.rank, update.minibatch_losses, 0

    def spoiled(now: Any, part: Any, targets: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        nan = float("nan") if rank == 1 and calls == 4 else 1.0
        return minibatch(now, part, targets._replace(advantages=targets.advantages * nan), *args)

    update.minibatch_losses = spoiled
    found = stepped(trainer, SHARES["half"][rank], count=1)
    update.minibatch_losses = minibatch
    return found | {"skipped": found["stats"][0]["ppo/policy/skipped_updates"]}


def traffic() -> dict[str, Any]:
    """What the updates of a step have sent, and what is left of the engine afterwards."""
    trainer = make_trainer(**(HALVED))
    parallel, seen = trainer.parallel, []
    assert isinstance(parallel, Replicated)
    wrapped = parallel._wrapped

    def spy() -> Any:
        ddp = wrapped()
        seen.append(weakref.ref(ddp.reducer))
        return ddp

    parallel._wrapped = spy
    gc.disable()
    stepped(trainer, SHARES["half"][trainer.world.rank], count=1)
    left = [one() for one in seen]
    gc.enable()
    sent = parallel.traffic
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    return {"left": left, "bytes": sent.bytes, "seconds": sent.seconds, "expected": 2 * trained, "passes": len(seen)}


def be_one_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = world_from_environment().rank
    results: dict[str, Any] = {}
    for kind, shares in SHARES.items():
        for name, run in CASES.items() if kind == "half" else [("llama", CASES["llama"])]:
            results[f"{name}, {kind}"] = run(shares[rank])
    for name, run in {"failing": failing, "skipping": partial(spoil_second, {}), "traffic": traffic}.items():
        results[name] = run()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks did."""
    return run_ranks(__file__, tmp_path_factory.mktemp("ranks"), warnings="default")


def assert_same_bits(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, x in first["weights"].items():
        assert torch.equal(x, second["weights"][name]), name
    torch.testing.assert_close(first["stats"], second["stats"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [*(f"{name}, half" for name in CASES), "llama, unequal"])
def test_two_ranks_do_what_one_does_with_all_rows(ranks: list[dict[str, Any]], name: str) -> None:
    """The same bits on both, and to rounding those of one process, statistics included."""
    first, second = (rank[name] for rank in ranks)
    assert_same_bits(first, second)
    alone = CASES[name.partition(", ")[0]](slice(None))
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
    if name != "pieces, half":
        # A rank's own largest minibatch, and how many updates there are, are the same; so is everything else.
        torch.testing.assert_close(first["stats"], alone["stats"], rtol=1e-4, atol=1e-5)


def test_what_gets_no_gradient_anywhere_is_not_stepped_on(ranks: list[dict[str, Any]]) -> None:
    """Weight decay would move it if zeros stood in the place of its gradient."""
    assert ranks[0]["a parameter without gradient, half"]["weights"]["unread"].tolist() == [1.0, 1.0, 1.0]


def test_a_loss_that_one_rank_cannot_make_ends_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    """And leaves nothing that the next one would stumble over."""
    first, second = (rank["failing"] for rank in ranks)
    assert "no such loss" in second["said"]
    assert first["calls"] == second["calls"] == 2
    assert_same_bits(first, second)


def test_an_update_that_is_left_out_leaves_the_others_as_they_are(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["skipping"] for rank in ranks)
    assert first["skipped"] == second["skipped"] == 1
    assert_same_bits(first, second)
    assert all(x.isfinite().all() for x in first["weights"].values())


def test_each_gradient_is_sent_once_in_an_update(ranks: list[dict[str, Any]]) -> None:
    """However many minibatches it has; and after the step nothing of torch's engine holds memory."""
    for rank in ranks:
        found = rank["traffic"]
        assert found["bytes"] == found["expected"] + 2 * 4, "and one number that keeps torch from complaining"
        assert found["seconds"] > 0
        assert found["passes"] == 4, "two updates of two minibatches"
        assert found["left"] == [None] * 4


def test_a_world_of_one_is_not_wrapped() -> None:
    trainer = make_trainer()
    assert type(trainer.parallel) is Alone
    trainer.step(*make_batch())
    assert trainer.parallel.traffic.calls == 0


def test_the_trainer_needs_no_types_that_a_torch_without_processes_lacks() -> None:
    code = "import torch.distributed as dist; del dist.GradBucket; import ppo_runtime.trainer"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)


if __name__ == "__main__":
    be_one_rank(Path(sys.argv[1]))
