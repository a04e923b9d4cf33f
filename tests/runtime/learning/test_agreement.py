"""The trainer's default path against an independent rendering of the same formulas in float64."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch

import ppo_core.rewards
from ppo_runtime.learning import update
from ppo_runtime.learning.update import Targets
from tests.runtime.support import rendering
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer

FAMILIES = ("llama", "gpt2", "t5")
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class Seen(NamedTuple):
    """What went through the trainer's hands during one step."""

    rewards: list[torch.Tensor]
    targets: list[Targets]
    policy_losses: list[tuple[float, float]]
    """(total, tokens) of every minibatch."""
    value_losses: list[tuple[float, float]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Look over the shoulder of the core's functions, wherever the runtime has imported them."""
    record = Seen([], [], [], [])
    compute, minibatch = ppo_core.rewards.compute_rewards, update.minibatch_losses

    def compute_rewards(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        record.rewards.append(result.rewards)
        return result

    def minibatch_losses(now: Any, part: Any, targets: Targets, *args: Any, **kwargs: Any) -> Any:
        losses = minibatch(now, part, targets, *args, **kwargs)
        record.targets.append(targets)
        for kept, loss in ((record.policy_losses, losses.policy.loss), (record.value_losses, losses.value.loss)):
            kept.append((loss.total.item(), loss.weight.item()))
        return losses

    for original, spy in ((compute, compute_rewards), (minibatch, minibatch_losses)):
        for name, module in list(sys.modules.items()):
            if name.startswith("ppo_runtime") and getattr(module, original.__name__, None) is original:
                monkeypatch.setattr(module, original.__name__, spy)
    return record


def rendered_and_ours(
    family: str, *, adam_eps: float, learning_rate: float, accumulation: int = 1, **other: Any
) -> tuple[rendering.Step, Any, dict[str, Any]]:
    """The same batch through both, the rendering with ``other`` settings; its step, the trainer, the statistics."""
    trainer = make_trainer(
        family,
        ref_model=tiny_model(family, seed=1),
        learning_rate=learning_rate,
        ppo_epochs=3,
        gradient_accumulation_steps=accumulation,
        optimizer_of=lambda model: torch.optim.Adam(model.parameters(), lr=learning_rate, eps=adam_eps),
    )
    config = trainer.config
    queries, responses, scores = make_batch()
    generator = torch.Generator().manual_seed(config.seed)
    update_size = 2 * accumulation
    order = [
        [rows.tolist() for rows in torch.randperm(6, generator=generator).split(update_size)]
        for _ in range(config.ppo_epochs)
    ]
    assert trainer.ref_model is not None
    expected = rendering.ppo_step(
        rendering.in_float64(trainer.model),
        rendering.in_float64(trainer.ref_model),
        [query.tolist() for query in queries],
        [response.tolist() for response in responses],
        [float(score) for score in scores],
        order,
        rendering.Settings(
            kl_coef=0.2,
            gamma=1.0,
            lam=0.95,
            cliprange=0.2,
            cliprange_value=0.2,
            vf_coef=0.1,
            learning_rate=learning_rate,
            adam_eps=adam_eps,
        )._replace(**other),
    )
    return expected, trainer, trainer.step(queries, responses, scores)


def assert_rows_close(ours: torch.Tensor, expected: list[list[float]]) -> None:
    """A padded float32 [B, T] against ragged lists."""
    assert ours.dtype == torch.float32
    for row, numbers in zip(ours, expected, strict=True):
        torch.testing.assert_close(row[: len(numbers)].double(), torch.tensor(numbers).double(), **TOLERANCE)
        assert not row[len(numbers) :].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_agrees_with_the_rendering(family: str, seen: Seen) -> None:
    """Rewards, advantages, returns, losses and weights to 1e-5; an eps that keeps Adam smooth around 0."""
    expected, trainer, stats = rendered_and_ours(family, adam_eps=1e-4, learning_rate=1e-3)
    (rewards,) = seen.rewards
    targets = seen.targets[0]
    columns = [list(column) for column in zip(*expected.sequences, strict=True)]
    logprobs, _, values, expected_rewards, _, returns = columns
    assert_rows_close(targets.old_logprobs, logprobs)
    assert_rows_close(targets.old_values, values)
    assert_rows_close(rewards, expected_rewards)
    assert_rows_close(targets.advantages, expected.advantages)
    assert_rows_close(targets.returns, returns)
    for ours, losses in ((seen.policy_losses, expected.policy_losses), (seen.value_losses, expected.value_losses)):
        means = torch.tensor([total / weight for total, weight in ours])
        torch.testing.assert_close(means, torch.tensor(losses), **TOLERANCE)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected.weights[name], **TOLERANCE)
    assert stats["objective/kl"] == pytest.approx(expected.kl, rel=1e-5, abs=1e-5)
    weights = [weight for _, weight in seen.policy_losses]
    mean_loss = sum(a * b for a, b in zip(expected.policy_losses, weights, strict=True)) / sum(weights)
    assert stats["ppo/loss/policy"] == pytest.approx(mean_loss, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "other", [{"lam": 0.9}, {"kl_coef": 0.21}, {"cliprange": 0.1}, {"vf_coef": 0.11}], ids=lambda o: next(iter(o))
)
def test_the_comparison_has_teeth(other: dict[str, Any]) -> None:
    """A slightly different formula moves the weights by many tolerances, and the batch is not a trivial one."""
    expected, trainer, stats = rendered_and_ours("llama", adam_eps=1e-4, learning_rate=1e-3, **other)
    weights = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    apart = [(weights[name] - expected.weights[name]).abs().max().item() for name in weights]
    assert max(apart) > 10 * TOLERANCE["atol"]
    assert abs(expected.kl) > 0.1
    assert stats["ppo/policy/clipfrac"] > 0.0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_update_of_several_minibatches_is_one_of_all_their_tokens(family: str) -> None:
    """Under gradient accumulation a mean over the whole backward batch, in which minibatches differ in tokens."""
    expected, trainer, _ = rendered_and_ours(family, adam_eps=1e-4, learning_rate=1e-3, accumulation=3)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected.weights[name], **TOLERANCE)


def test_the_default_optimiser_and_learning_rate() -> None:
    """Adam with its own eps, on every weight whose gradient is more than rounding."""
    trainer = make_trainer("llama", learning_rate=1e-5)
    assert type(trainer.optimizer) is torch.optim.Adam
    assert trainer.optimizer.defaults["eps"] == 1e-8
    expected, trainer, _ = rendered_and_ours("llama", adam_eps=1e-8, learning_rate=1e-5)
    compared = 0
    for name, parameter in trainer.model.named_parameters():
        real = expected.smallest_gradient[name] > 1e-5
        compared += int(real.sum())
        torch.testing.assert_close(
            parameter[real].double(), expected.weights[name][real], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert compared > 1000
