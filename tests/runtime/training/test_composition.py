"""What a trainer is composed of can be replaced: the engine, the estimator of advantages, the policy's loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_core.advantages import Advantages
from ppo_core.averages import Average
from ppo_core.losses import PolicyLoss
from ppo_core.returns import reward_to_go
from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig, Trainer
from ppo_runtime.learning.advantages import gae_estimator
from ppo_runtime.learning.update import clipped_objective
from tests.core.close import assert_close
from tests.runtime.support.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
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


def spoiled(**changes: Any) -> Any:
    """The usual estimator, with changes to what it gives."""

    def estimator(rewards: Tensor, values: Tensor, mask: Tensor, *, config: PPOConfig) -> Any:
        found = gae_estimator(rewards, values, mask, config=config)._asdict()
        return Advantages(**(found | {name: change(found[name], mask) for name, change in changes.items()}))

    return estimator


def put(value: float) -> Any:
    """A change of the second response's first token."""
    return lambda x, _: x.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(value))


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (spoiled(advantages=put(math.nan)), r"responses\[1\], token 0: advantages= gave an advantage of nan and"),
        (spoiled(advantages=put(1e30)), r"responses\[1\], token 0: advantages= gave an advantage of 1e\+30 and"),
        (
            spoiled(returns=put(math.nan)),
            r"responses\[1\], token 0: advantages= gave an advantage of .* return of nan,",
        ),
        (spoiled(returns=put(-math.inf)), r"responses\[1\], token 0: advantages= gave an advantage of .* of -inf,"),
        (
            spoiled(advantages=lambda x, _: x[:, 0]),
            r"advantages= gave advantages of shape \(6,\) .*, expected \(6, 6\)",
        ),
        (spoiled(returns=lambda x, _: x.long()), r"advantages= gave returns as a tensor of torch.int64, expected a"),
        (spoiled(returns=lambda x, _: x.tolist()), r"advantages= gave returns as a list, expected a tensor"),
        (lambda r, v, m, config: (r, v), r"advantages= gave a tuple, expected ppo_core.advantages.Advantages"),
    ],
)
def test_what_an_estimator_gives_wrongly_is_refused_by_name(estimator: Any, message: str) -> None:
    trainer = composed(advantages=estimator)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.step(*make_batch())
    assert trainer.current_step == 0
    assert all(torch.equal(x, before[name]) for name, x in trainer.model.state_dict().items())


def test_an_estimator_may_leave_anything_where_nothing_counts() -> None:
    def strewn(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x, math.nan)

    expected, found = (
        untimed(composed(advantages=estimator).step(*make_batch()))
        for estimator in (gae_estimator, spoiled(advantages=strewn, returns=strewn))
    )
    np.testing.assert_equal(found, expected)


@pytest.mark.parametrize(("bad", "blamed"), [(1e20, r"scores\[1\] is 1e\+20"), (math.nan, r"scores\[1\] is nan")])
def test_bad_scores_are_not_blamed_on_the_estimator(bad: float, blamed: str) -> None:
    queries, responses, scores = make_batch()
    scores[1] = torch.tensor(bad)
    with pytest.raises(ValueError, match=blamed):
        composed().step(queries, responses, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.loss.total, "policy_loss= gave a Tensor, expected ppo_core.losses.PolicyLoss"),
        (tuple, "policy_loss= gave a tuple, expected"),
        (
            lambda found: found._replace(loss=Average(found.loss.total, found.loss.weight.int())),
            "policy_loss= gave loss as .*, expected 0-d tensors of floating-point numbers",
        ),
        (
            lambda found: found._replace(loss=found.loss._replace(total=found.loss.total.detach())),
            "policy_loss= gave a loss without gradient, expected one that depends on logprobs",
        ),
        (lambda found: found._replace(ratio_deviation=torch.zeros(3)), "policy_loss= gave ratio_deviation as tensor"),
        (lambda found: found._replace(loss=found.loss.total), "policy_loss= gave loss as .*, expected 0-d tensors"),
        (
            lambda found: found._replace(ratio=Average(*torch.ones(2, 3))),
            "policy_loss= gave ratio as Average.*, expected 0-d",
        ),
        (
            lambda found: found._replace(loss=found.loss._replace(total=found.loss.total[None])),
            r"policy_loss= gave loss as Average\(total=tensor\(\[.*, expected 0-d tensors",
        ),
        (lambda found: found._replace(ratio_deviation=0.0), r"policy_loss= gave ratio_deviation as 0.0, expected 0-d"),
    ],
)
def test_what_a_policy_loss_gives_wrongly_is_refused_by_name(change: Any, message: str) -> None:
    trainer = composed(policy_loss=lambda *args, config: change(clipped_objective(*args, config=config)))
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.step(*make_batch())
    assert trainer.current_step == 0
    assert trainer.broken_off is None


def test_another_engine_answers() -> None:
    def canned(model: Any, queries: Any, settings: Any, plan: Any, new_tokens: Any, ours: Any) -> list[Tensor]:
        return [query.flip(0) for query in queries]

    trainer = composed(engine=canned)
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    answers = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=4)
    assert [answer.tolist() for answer in answers] == [[7, 6, 5], [9, 8]]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([[5]], r"engine= gave: responses has 1 rows, expected 2 like queries"),
        ([[5], [6], [7]], r"engine= gave: responses has 3 rows, expected 2 like queries"),
        ([[5], []], r"engine= gave: responses\[1\] is empty, expected at least one token; a policy that stops at once"),
        ([[5], [VOCAB_SIZE]], rf"engine= gave: responses\[1\] holds token id {VOCAB_SIZE}, expected ids in"),
        ([[5], [[6]]], r"engine= gave: responses\[1\] has shape \(1, 1\), expected 1-d"),
        ([[5], [6.0]], r"engine= gave: responses\[1\] has dtype torch.float32, expected token ids"),
    ],
)
@pytest.mark.parametrize("with_prompt", [True, False])
def test_what_an_engine_gives_wrongly_is_refused_by_name(answers: Any, message: str, with_prompt: bool) -> None:
    trainer = composed(engine=lambda *_: [torch.tensor(answer) for answer in answers])
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    with pytest.raises(ValueError, match=message):
        trainer.generate(queries, return_prompt=with_prompt, do_sample=True, top_k=0, max_new_tokens=4)


@pytest.mark.parametrize("rows", [torch.ones(2, 4, dtype=torch.long), [[5], [6]], "ab"])
def test_an_engine_that_gives_no_tensors_is_refused_by_name(rows: Any) -> None:
    trainer = composed(engine=lambda *_: rows)
    with pytest.raises(ValueError, match=r"^what engine= gave: responses(\[0\])? is a "):
        trainer.generate([torch.tensor([5]), torch.tensor([8, 9])], do_sample=True, top_k=0, max_new_tokens=4)


@pytest.mark.parametrize("part", ["engine", "advantages", "policy_loss"])
def test_what_cannot_be_called_is_refused_by_name(part: str) -> None:
    with pytest.raises(TypeError, match=f"{part} is 'gae', expected a function"):
        composed(**{part: "gae"})


@pytest.mark.parametrize("part", ["advantages", "policy_loss"])
def test_what_takes_no_settings_is_refused_by_name(part: str) -> None:
    with pytest.raises(TypeError, match=rf"{part} is <function .*, expected a function that takes config=: got"):
        composed(**{part: lambda *tensors: tensors})
