"""The trainer's own Adam steps what it is given, as it lies in memory; an optimiser steps nothing beyond its ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppo_runtime import PPOConfig, PPOTrainer
from ppo_runtime.assembly import make_optimizer
from ppo_runtime.checkpoint import save_checkpoint
from tests.runtime.support.tiny import VOCAB_SIZE
from tests.runtime.support.trainers import make_batch, make_trainer


@pytest.mark.parametrize("lies", ["whole", "a part of wider rows", "transposed"])
def test_every_entry_moves_and_nothing_else(lies: str) -> None:
    torch.manual_seed(0)
    storage = torch.randn(6, 8)
    data = {"whole": storage, "a part of wider rows": storage[:, :4], "transposed": storage.T}[lies]
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(0))
    model.weight.data = data
    before, around = data.clone(), storage.clone()
    optimizer = make_optimizer(model, PPOConfig(learning_rate=0.1))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full_like(before, 0.1), rtol=1e-4, atol=1e-6)
    assert int((storage != around).sum()) == data.numel()


def grown(trainer: PPOTrainer) -> None:
    for model in (trainer.model, trainer.ref_model):
        model.pretrained_model.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)


def loaded(trainer: PPOTrainer) -> None:
    """The state of a model with fewer tokens, which torch takes."""
    state = trainer.optimizer.state_dict()
    first = state["state"][0]
    trainer.optimizer.load_state_dict(
        state | {"state": state["state"] | {0: {k: v[:-8] if v.ndim else v for k, v in first.items()}}}
    )


def factored(trainer: PPOTrainer) -> None:
    """As an optimiser of another kind would have it; no fused kernel knows of it."""
    parameter = next(trainer.model.parameters())
    trainer.optimizer.state[parameter]["exp_avg"] = trainer.optimizer.state[parameter]["exp_avg"][:1]


def pruned(trainer: PPOTrainer) -> None:
    """Views of half as wide rows, for which new moments are wanted as well."""
    for model in (trainer.model, trainer.ref_model):
        for layer in model.pretrained_model.model.layers:
            layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data[:16]
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data[:16]
            layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :16]
    trainer.optimizer.state.clear()


def moments_in_columns(trainer: PPOTrainer) -> None:
    parameter = next(trainer.model.parameters())
    moment = trainer.optimizer.state[parameter]["exp_avg"]
    trainer.optimizer.state[parameter]["exp_avg"] = moment.T.contiguous().T


EMBEDDINGS = "pretrained_model.model.embed_tokens.weight"
MISFITS: dict[str, tuple[Callable[[PPOTrainer], None], str]] = {
    "a vocabulary that has grown": (
        grown,
        rf"exp_avg of shape \({VOCAB_SIZE}, 16\) for the parameter {EMBEDDINGS} of .*{VOCAB_SIZE + 8}.*clear",
    ),
    "a state of fewer tokens": (
        loaded,
        rf"exp_avg of shape \({VOCAB_SIZE - 8}, 16\) for the parameter {EMBEDDINGS} of shape \({VOCAB_SIZE}, 16\)",
    ),
    "a factored moment": (factored, rf"exp_avg of shape \(1, 16\) for the parameter {EMBEDDINGS} of shape"),
    "a view of wider rows": (pruned, r"mlp\.down_proj\.weight of shape \(16, 16\) and strides \(32, 1\).*contiguous\("),
    "a moment in another order": (
        moments_in_columns,
        rf"exp_avg of the parameter {EMBEDDINGS} with strides \(1, {VOCAB_SIZE}\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_fused_optimiser_steps_nothing_that_it_does_not_fit(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, message = MISFITS[case]
    trainer, batch = make_trainer(), make_batch()
    trainer.step(*batch)
    change(trainer)
    # Past its ends it would take the process with it.
    monkeypatch.setattr(trainer.optimizer, "step", lambda: pytest.fail("stepped"))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for use in (
        lambda: trainer.step(*batch),
        lambda: save_checkpoint(trainer, tmp_path / "checkpoint"),
        lambda: setattr(trainer, "optimizer", trainer.optimizer),
        lambda: trainer.train_minibatch(*[torch.ones(1, 1)] * 8),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.current_step == 1


def test_what_the_refusals_advise_helps() -> None:
    batch = make_batch()
    trainer = make_trainer()
    trainer.step(*batch)
    grown(trainer)
    trainer.optimizer.state.clear()
    trainer.step(*batch)

    found = []
    for mend in ("contiguous", "fused=False"):
        trainer = make_trainer()
        pruned(trainer)
        if mend == "contiguous":
            for parameter in trainer.model.parameters():
                parameter.data = parameter.data.contiguous()
        else:
            trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=trainer.config.learning_rate)
        trainer.step(*batch)
        found.append([p.detach().clone() for p in trainer.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_moments_that_only_their_optimiser_understands_are_its_own_business() -> None:
    """One with a step of its own, one of torch's that factors, and one over what is frozen meanwhile."""

    class Sums(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["sums"] = parameter.grad.sum((0,), keepdim=True)[..., None]
            return super().step(closure)

    batch = make_batch()
    for kind in (Sums, torch.optim.Adafactor):
        trainer = make_trainer(optimizer_of=lambda model, kind=kind: kind(model.parameters(), lr=1e-3))
        for _ in range(2):
            trainer.step(*batch)

    trainer = make_trainer()
    trainer.step(*batch)
    trainer.model.pretrained_model.model.embed_tokens.weight.requires_grad_(False)
    factored(trainer)
    trainer.step(*batch)
