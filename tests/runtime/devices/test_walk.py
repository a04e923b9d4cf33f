"""A rollout and a whole step on a device that is not the CPU, by :mod:`tests.runtime.devices.pretend`, which see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_core.losses import PolicyLoss
from ppo_runtime import PPOConfig, PPOTrainer
from ppo_runtime.learning import forward
from ppo_runtime.learning.forward import Rows
from ppo_runtime.learning.update import clipped_objective
from tests.runtime.devices.pretend import DEVICE, MixedDevicesError, Pretended, placed, pretending
from tests.runtime.support.tiny import ALL_FAMILIES, EOS_ID, tiny_lora
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

pytestmark = pytest.mark.usefixtures("torchs_layer_norm")

POLICIES = [*ALL_FAMILIES, "gpt2+lora", "llama+lora", "t5+lora"]
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4}


def there(x: Tensor) -> Tensor:
    return x.to(DEVICE)


# What a GPU says to each: numbers on the CPU may meet tensors of the device, and indices may come from there.
x, row, number = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor(2.0)
REFUSED: dict[str, Callable[[], Any]] = {
    "sum": lambda: there(x) + x,
    "product": lambda: there(x) @ x.T,
    "number first": lambda: torch.cat((there(x), x)),
    "numbers side by side": lambda: torch.stack((there(number), number)),
    "choice": lambda: torch.where(x > 0, there(x), 0.0),
    "mask": lambda: there(x).masked_fill(x > 0, 1.0),
    "in place": lambda: x.clone().add_(there(x)),
    "into a number": lambda: number.clone().add_(there(number)),
    "lookup": lambda: torch.nn.functional.embedding(row, there(x)),
    "gather": lambda: there(x).gather(1, row[:, None]),
    "indices of the device": lambda: x[there(row)],
    "assignment": lambda: there(x).__setitem__(row, x),
    "out": lambda: torch.add(there(x), 1, out=torch.empty(2, 3)),
    "generator": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    "loss": lambda: torch.nn.functional.mse_loss(there(x), x),
}
ALLOWED: dict[str, Callable[[], Any]] = {
    "number": lambda: there(x) * number + number,
    "choice of a number": lambda: torch.where(there(x) > 0, number, there(x)),
    "fill": lambda: there(x).masked_fill(there(x) > 0, number),
    "indices": lambda: there(x)[row],
    "mask": lambda: there(x)[x > 0],
    "assignment": lambda: there(x).__setitem__(row, number),
    "copy": lambda: x.clone().copy_(there(x)),
    "made": lambda: torch.tensor([1.0], device=DEVICE) + torch.zeros(1, device=DEVICE) + there(x).new_ones(1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_what_a_gpu_refuses(what: str) -> None:
    with pretending(), pytest.raises(MixedDevicesError):
        REFUSED[what]()


@pytest.mark.parametrize("what", ALLOWED)
def test_it_allows_what_a_gpu_allows(what: str) -> None:
    with pretending():
        ALLOWED[what]()


WAITS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "item": (lambda: there(number).item(), ["upload", "number"]),
    "truth": (lambda: bool((there(x) > 0).all()), ["upload", "number"]),
    "tolist": (lambda: there(row).tolist(), ["upload", "rows"]),
    "cpu": (lambda: there(row).cpu(), ["upload", "rows"]),
    "copy": (lambda: torch.zeros(2, 3).copy_(there(x)), ["upload", "rows"]),
    "tensor": (lambda: torch.tensor([1, 2], device=DEVICE), ["upload"]),
    "nonzero": (lambda: there(x).nonzero(), ["upload", "size"]),
    "mask": (lambda: there(x)[there(x) > 0], ["upload", "upload", "size"]),
    "masked_select": (lambda: there(x).masked_select(there(x) > 0), ["upload", "upload", "size"]),
    "unique": (lambda: there(x).unique(), ["upload", "size"]),
    "equal": (lambda: torch.equal(there(x), there(x)), ["upload", "upload", "number"]),
    "indices": (lambda: there(x)[row], ["upload", "upload"]),
    "filled": (lambda: there(x).__setitem__(there(x) > 0, 1.0), ["upload", "upload"]),
    "nothing": (lambda: (there(x) + 1).sum(), ["upload"]),
    "empty": (lambda: torch.tensor([], device=DEVICE), []),
}


@pytest.mark.parametrize("what", WAITS)
def test_it_notes_where_the_host_waits(what: str) -> None:
    asked, expected = WAITS[what]
    with pretending() as waits:
        asked()
    assert [wait.why for wait in waits] == expected


def test_gradients_are_those_of_the_cpu() -> None:
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    here, away = weight.clone().requires_grad_(), Pretended(weight.clone()).requires_grad_()
    with pretending():
        for w in (here, away):
            y = w.tanh() @ w
            y[:, 1:].mul_(2.0)
            torch.nn.functional.scaled_dot_product_attention(y[None], y[None], y[None]).square().sum().backward()
    assert isinstance(away.grad, Pretended)
    assert here.grad is not None
    torch.testing.assert_close(away.grad.held, here.grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
        away.grad.numpy()


class Walked(NamedTuple):
    """What a rollout and a step leave."""

    responses: list[list[int]]
    others: list[list[int]]
    """The reference's."""
    stats: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: list[Tensor]


def trainer_of(policy: str, *, away: bool, **settings: Any) -> PPOTrainer:
    family, _, adapter = policy.partition("+")
    trainer = make_trainer(
        family,
        peft_config=tiny_lora(family) if adapter else None,
        placed=placed if away else None,
        **({"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 1, "learning_rate": 1e-2} | settings),
    )
    # A gradient that is 0 but for rounding, as that of a key's bias, is no direction to step in.
    trainer.optimizer.param_groups[0]["eps"] = 1e-3
    return trainer


def walk(policy: str, *, away: bool) -> Walked:
    """A rollout of policy and reference, whose responses are trained on with scores and masks from the same device."""
    with pretending():
        trainer = trainer_of(policy, away=away)
        queries, _, scores = make_batch(4)
        queries[0][-1] = EOS_ID
        rollout = trainer.generate(queries, return_prompt=False, generate_ref_response=True, **SAMPLING)
        assert all(isinstance(row, Pretended) == away for rows in rollout for row in rows)
        responses, others = rollout
        masks = [torch.ones_like(row) for row in responses]
        masks[1][0] = 0
        stats = trainer.step(queries, responses, [there(s) for s in scores] if away else scores, masks)
        lists = ([row.tolist() for row in responses], [row.tolist() for row in others])
    states = [x for state in trainer.optimizer.state.values() for x in state.values()]
    assert all(isinstance(p, Pretended) == away for p in trainer.model.parameters())
    assert all(isinstance(x, Pretended) == away for x in states if x.ndim)
    weights = {name: held(p) for name, p in trainer.model.named_parameters()}
    return Walked(*lists, untimed(stats), weights, [held(x) for x in states])


def held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, Pretended) else x.detach()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_rollout_and_a_step_are_those_of_the_cpu(policy: str) -> None:
    """Nothing meets what lies on the other side, and tokens, statistics, weights and moments are the same."""
    here, away = walk(policy, away=False), walk(policy, away=True)
    assert (away.responses, away.others) == (here.responses, here.others)
    assert here.stats["ppo/policy/approxkl"] > 1e-6
    assert away.stats.keys() == here.stats.keys()
    for name, number in here.stats.items():
        np.testing.assert_allclose(away.stats[name], number, rtol=1e-4, atol=1e-5, err_msg=name)
    torch.testing.assert_close(away.weights, here.weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(away.optimizer, here.optimizer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["llama", "t5"])
@pytest.mark.parametrize("left", ["input_ids", "attention_mask", "predictors", "tokens", "mask"])
def test_a_part_of_the_rows_left_on_the_cpu_is_caught(policy: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a GPU would not forgive; indices alone it would."""
    laid_out = PPOTrainer._lay_out

    def with_a_part_left(*args: Any) -> Rows:
        rows = laid_out(*args)
        return rows._replace(**{left: getattr(rows, left).cpu()})

    with pretending():
        trainer = trainer_of(policy, away=True)
        monkeypatch.setattr(PPOTrainer, "_lay_out", with_a_part_left)
        with pytest.raises((MixedDevicesError, ValueError), match=r"on the CPU meets|is on cpu, expected lazy"):
            trainer.step(*make_batch(4))


def test_a_loss_of_ones_own_that_makes_a_tensor_on_the_cpu_is_caught() -> None:
    def policy_loss(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, config: PPOConfig
    ) -> PolicyLoss:
        return clipped_objective(logprobs, old_logprobs, advantages * torch.ones(logprobs.shape), mask, config=config)

    with pretending():
        trainer = trainer_of("llama", away=True)
        trainer.policy_objective = policy_loss
        with pytest.raises(MixedDevicesError, match=r"aten\.mul"):
            trainer.step(*make_batch(4))


def test_a_model_half_way_there_is_refused_by_name() -> None:
    with pretending():
        trainer = trainer_of("llama", away=True)
        with pytest.raises(ValueError, match="ref_model is on cpu, expected lazy:0 like model"):
            trainer.ref_model = make_trainer("llama").model
        placed(model := make_trainer("llama").model)
        model.v_head.summary.weight = torch.nn.Parameter(torch.zeros(1, 16))
        with pytest.raises(ValueError, match="model has parameters on cpu and lazy:0, expected one device"):
            PPOTrainer(trainer.config, model, None, trainer.tokenizer)


def test_tiles_of_the_head_are_wide_and_passes_long_where_launching_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the device is asked of where the tensors are."""
    asked: dict[str, list[Any]] = {}
    fused, bucketed = forward.fused_logprobs, forward.length_buckets

    def spy(hidden: Tensor, *args: Any, **settings: Any) -> Any:
        asked.setdefault(hidden.device.type, []).append((settings["chunk_size"], settings["keep_logits"]))
        return fused(hidden, *args, **settings)

    def buckets(lengths: Any, most_tokens: int) -> Any:
        asked.setdefault("passes", []).append(most_tokens)
        return bucketed(lengths, most_tokens)

    monkeypatch.setattr(forward, "fused_logprobs", spy)
    monkeypatch.setattr(forward, "length_buckets", buckets)
    monkeypatch.setitem(forward.HEAD_CHUNK, "cpu", 10)
    monkeypatch.setitem(forward.KEPT_LOGITS, "cpu", 0)
    for away in (False, True):
        with pretending():
            trainer_of("llama", away=away).step(*make_batch(4))
    # Policy and reference without gradient, then two minibatches.
    assert asked["cpu"] == [(10, False)] * 4
    assert asked[DEVICE.type] == [(forward.HEAD_CHUNK_ELSEWHERE, learns) for learns in (False, False, True, True)]
    assert asked["passes"] == [forward.SCORING_TOKENS["cpu"], forward.SCORING_TOKENS_ELSEWHERE]
