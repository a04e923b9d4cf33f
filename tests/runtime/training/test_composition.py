"""What a trainer is composed of can be replaced: the engine, the estimator of advantages, the policy's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_core.advantages import Advantages
from ppo_core.losses import PolicyLoss
from ppo_core.returns import reward_to_go
from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, Trainer
from ppo_runtime.learning.update import clipped_objective
from tests.core.close import assert_close
from tests.runtime.support.tiny import tiny_model, tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer, untimed


def composed(**parts: Any) -> Trainer:
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    return Trainer(PPOConfig(**SETTINGS), model, tiny_tokenizer(), **parts)


def test_without_parts_it_is_the_trainer_by_the_old_name() -> None:
    expected, found = (untimed(trainer.step(*make_batch())) for trainer in (make_trainer(), composed()))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] == value).all() if hasattr(value, "all") else found[name] == value, name


def test_another_estimator_gives_the_advantages() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def without_critic(rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig) -> Advantages:
        returns = reward_to_go(rewards, mask, gamma=config.gamma)
        seen.append((returns, mask))
        return Advantages(returns, returns)

    stats = composed(advantages=without_critic).step(*make_batch())
    ((returns, mask),) = seen
    kept = returns[mask]
    assert_close(torch.tensor(stats["ppo/policy/advantages_mean"]), kept.mean())
    assert_close(torch.tensor(stats["ppo/returns/mean"]), kept.mean())
    whitened = torch.tensor(stats["ppo/policy/advantages"])
    assert_close(whitened, (kept - kept.mean()) / kept.std())


def test_another_policy_loss_is_minimised() -> None:
    calls: list[float] = []

    def half(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *, config: PPOConfig) -> PolicyLoss:
        found = clipped_objective(logprobs, old, advantages, mask, config=config)
        calls.append(config.cliprange)
        return found._replace(loss=found.loss._replace(total=0.5 * found.loss.total))

    one_update = {"ppo_epochs": 1, "mini_batch_size": 6}
    whole, halved = (
        Trainer(
            PPOConfig(**(SETTINGS | one_update)),
            AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama")),
            tiny_tokenizer(),
            policy_loss=objective,
        ).step(*make_batch())["ppo/loss/policy"]
        for objective in (clipped_objective, half)
    )
    assert calls == [0.2]
    assert halved == pytest.approx(0.5 * whole, rel=1e-5)


def test_another_engine_answers() -> None:
    def canned(model: Any, queries: Any, settings: Any, plan: Any, new_tokens: Any, ours: Any) -> list[Tensor]:
        return [query.flip(0) for query in queries]

    trainer = composed(engine=canned)
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    answers = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=4)
    assert [answer.tolist() for answer in answers] == [[7, 6, 5], [9, 8]]


@pytest.mark.parametrize("part", ["engine", "advantages", "policy_loss"])
def test_what_cannot_be_called_is_refused_by_name(part: str) -> None:
    with pytest.raises(TypeError, match=f"{part} is 'gae', expected a function"):
        composed(**{part: "gae"})
