"""What a step reports, keeps and undoes where a part of it fails."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_runtime import PPOConfig, PPOTrainer
from ppo_runtime.checkpoint import load_checkpoint, save_checkpoint
from ppo_runtime.learning import update
from ppo_runtime.ranks.world import World, world_from_environment
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

NAN, INF = float("nan"), float("inf")
LINEAR = torch.optim.lr_scheduler.LinearLR


def spoil_losses(monkeypatch: pytest.MonkeyPatch, value: float, *, spoiled: Callable[[int], bool]) -> None:
    """Log-probabilities become ``value`` in those updates (counted from 0) of the step."""
    losses_of, calls = update.losses_of, 0

    def bad(now: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return losses_of(now._replace(logprobs=now.logprobs * 0 + value) if spoiled(calls - 1) else now, *args)

    monkeypatch.setattr(update, "losses_of", bad)


# --- what a left-out update says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", [0, 4, 11])
def test_one_bad_update_poisons_no_statistic(which: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    spoil_losses(monkeypatch, value, spoiled=lambda number: number == which)
    stats = trainer.step(*make_batch())
    assert stats["ppo/policy/skipped_updates"] == 1
    assert [name for name, found in stats.items() if not np.isfinite(found).all()] == []
    assert stats["ppo/policy/entropy"] > 0


@pytest.mark.parametrize("value", [NAN, INF])
def test_early_stopping_still_judges_the_updates_that_were_made(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"early_stopping": True, "target_kl": 1e-4, "learning_rate": 1e-2}
    assert make_trainer(**settings).step(*make_batch())["ppo/policy/epochs"] == 1
    spoil_losses(monkeypatch, value, spoiled=lambda number: number % 3 == 0)
    stats = make_trainer(**settings).step(*make_batch())
    assert stats["ppo/policy/epochs"] == 1
    assert stats["ppo/policy/skipped_updates"] == 1


def test_a_kl_that_is_not_finite_counts_as_moved() -> None:
    one = torch.ones(())
    for total, moved in ((NAN, True), (INF, True), (1.0, True), (0.0, False)):
        averages = {"ppo/policy/policykl": update.Average(one * total, one)}
        assert update._has_moved(averages, PPOConfig(target_kl=0.5), World(0, 1)) is moved


# --- refused before the update begins ------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_a_token_without_probability_is_refused_under_the_full_kl(whose: str) -> None:
    """The whole vocabulary's KL leaves out what both give no probability, and so stays finite."""
    trainer = make_trainer("gpt_neox", kl_penalty="full")
    queries, responses, scores = make_batch()
    for model in (trainer.model, trainer.ref_model):
        head = model.pretrained_model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)), requires_grad=model is trainer.model)
        with torch.no_grad():
            head.bias[int(responses[0][0])] = -INF
    with pytest.raises(ValueError, match=r"responses\[0\], token 0: the policy's log-probability is -inf"):
        trainer.step(queries, responses, scores)
    assert trainer.current_step == 0


@pytest.mark.parametrize("coefficient", [1e22, 1e30, 1e38])
def test_an_overflowing_penalty_is_not_blamed_on_the_scores(coefficient: float) -> None:
    trainer = make_trainer(ref_model=tiny_model("llama", seed=1), init_kl_coef=coefficient, adap_kl_ctrl=False)
    with pytest.raises(ValueError, match=r"responses\[\d\], token \d.*init_kl_coef.*kl_penalty") as refusal:
        trainer.step(*make_batch())
    assert "scale the scores" not in str(refusal.value)


@pytest.mark.parametrize("size", ["two", "1.5", "0", "-1"])
def test_a_world_size_that_is_no_number_is_named(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{size}'"):
        world_from_environment()


def test_an_empty_world_size_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert world_from_environment() == World(0, 1)


# --- the scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["_update_controller", "_say_skipped"])
def test_a_step_broken_off_late_leaves_the_scheduler(late: str) -> None:
    def strike(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    trainer = make_trainer()
    trainer.lr_scheduler = LINEAR(trainer.optimizer)
    before = trainer.lr_scheduler.state_dict()
    setattr(trainer, late, strike)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*make_batch())
    assert trainer.current_step == 0
    assert trainer.lr_scheduler.state_dict() == before


def test_a_step_without_an_update_leaves_the_scheduler() -> None:
    trainer = make_trainer(ratio_threshold=1e-6)
    trainer.lr_scheduler = LINEAR(trainer.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = trainer.step(*make_batch())
    assert stats["ppo/policy/skipped_updates"] == 12
    assert trainer.lr_scheduler.last_epoch == 0
    trainer.config.ratio_threshold = 10.0
    trainer.step(*make_batch())
    assert trainer.lr_scheduler.last_epoch == 1


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """Has learning rates for two steps, and for those behind them none."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=2)


def listed(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.25][step])


def in_sequence(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer, [torch.optim.lr_scheduler.ConstantLR(optimizer), one_cycle(optimizer)], [1]
    )


class HalfWay:
    """A user's own: counts, sets the first group's rate, and then has none for the second."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        """The next rates."""
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / self.count
        if self.count == 3:
            raise KeyError("no rate")

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count over."""
        self.count = state["count"]


ENDING: dict[str, tuple[Callable[[torch.optim.Optimizer], Any], int]] = {
    "OneCycleLR": (one_cycle, 2),
    "LambdaLR": (listed, 2),
    "SequentialLR": (in_sequence, 3),
    "HalfWay": (HalfWay, 2),
}
"""Schedulers by name, and the steps after which they have a learning rate."""


def scheduled(name: str) -> PPOTrainer:
    trainer = make_trainer()
    trainer.lr_scheduler = ENDING[name][0](trainer.optimizer)
    return trainer


def options(trainer: PPOTrainer) -> list[dict[str, Any]]:
    """What a scheduler may set."""
    return [{name: x for name, x in group.items() if name != "params"} for group in trainer.optimizer.param_groups]


@pytest.mark.parametrize("resumed", [False, True], ids=["straight", "resumed"])
@pytest.mark.parametrize("name", ENDING)
def test_a_scheduler_at_its_end_is_named_before_a_step_changes_anything(
    name: str, resumed: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The step that has a rate is made whole; the next one, which has none, is refused as often as it is asked for."""
    trainer, last = scheduled(name), ENDING[name][1]
    for _ in range(last):
        trainer.step(*make_batch())
    assert not caplog.messages
    state, rates = copy.deepcopy(trainer.lr_scheduler.state_dict()), options(trainer)
    assert trainer.step(*make_batch())["ppo/policy/skipped_updates"] == 0
    assert trainer.current_step == last + 1
    assert trainer.broken_off is None
    assert f"lr_scheduler is a {name}, which has no learning rate for step {last + 2}" in caplog.text
    if resumed:
        save_checkpoint(trainer, tmp_path / "c")
        trainer = scheduled(name)
        load_checkpoint(trainer, tmp_path / "c")
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"a {name}, .* no learning rate for step {last + 2}.*lr_scheduler = None"
        ):
            trainer.step(*make_batch())
        assert trainer.current_step == last + 1
        assert trainer.broken_off is None
        assert trainer.lr_scheduler.state_dict() == state
        assert options(trainer) == rates
        assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    save_checkpoint(trainer, tmp_path / "c")
    trainer.lr_scheduler = None
    assert trainer.step(*make_batch())["ppo/learning_rate"] == rates[0]["lr"]
    assert trainer.current_step == last + 2


@pytest.mark.parametrize("refused", [False, True], ids=["at once", "a refusal between"])
def test_a_scheduler_that_was_mended_goes_on_where_it_stood(refused: bool) -> None:
    trainer = scheduled("OneCycleLR")
    for _ in range(3):
        trainer.step(*make_batch())
    trainer.lr_scheduler.total_steps = 9
    if refused:
        queries, responses, scores = make_batch()
        with pytest.raises(ValueError, match="nan"):
            trainer.step(queries, responses, [scores[0] * NAN, *scores[1:]])
    trainer.step(*make_batch())
    assert trainer.lr_scheduler.last_epoch == 4, "the step that was owed, and the next one"


@pytest.mark.parametrize("name", ENDING)
def test_a_scheduler_struck_in_its_step_is_undone(name: str) -> None:
    trainer = scheduled(name)
    trainer.step(*make_batch())
    state, rates = copy.deepcopy(trainer.lr_scheduler.state_dict()), options(trainer)
    whole = trainer.lr_scheduler.step

    def struck_behind(*_: Any) -> None:
        whole()
        raise KeyboardInterrupt

    trainer.lr_scheduler.step = struck_behind
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*make_batch())
    del trainer.lr_scheduler.step
    assert trainer.lr_scheduler.state_dict() == state
    assert options(trainer) == rates
    assert trainer.current_step == 1


@pytest.mark.parametrize("lacking", ["state_dict", "load_state_dict"])
def test_a_scheduler_assigned_later_is_looked_at_before_weights_move(lacking: str, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.lr_scheduler = HalfWay(trainer.optimizer)
    setattr(trainer.lr_scheduler, lacking, None)
    for use in (lambda: trainer.step(*make_batch()), lambda: save_checkpoint(trainer, tmp_path / "c")):
        with pytest.raises(TypeError, match=f"lr_scheduler is a HalfWay without {lacking}"):
            use()
    assert trainer.broken_off is None
    assert trainer.current_step == 0


# --- the trainer's own state ----------------------------------------------------------------------------------------


class OwnController:
    """A user's, with what the trainer asks of one and no more."""

    value = 0.1

    def update(self, current: float, n_steps: int) -> None:
        raise RuntimeError("mine")


def test_a_failing_step_with_a_users_own_controller_says_what_failed() -> None:
    trainer = make_trainer()
    trainer.kl_ctl = OwnController()
    with pytest.raises(RuntimeError, match="mine"):
        trainer.step(*make_batch())
    trainer.load_state_dict(trainer.state_dict() | {"kl_coef": 0.3})
    assert trainer.kl_ctl.value == 0.3


@pytest.mark.parametrize("value", ["0.1", None, NAN, INF, True])
def test_a_coefficient_that_is_no_number_is_named(value: Any) -> None:
    trainer = make_trainer()
    trainer.kl_ctl = OwnController()
    trainer.kl_ctl.value = value
    with pytest.raises(ValueError, match=rf"kl_ctl\.value is '?{value}'?, expected a finite number"):
        trainer.step(*make_batch())
    assert trainer.current_step == 0


@pytest.mark.parametrize("field", ["current_step", "kl_coef", "best_score", "scores"])
def test_a_state_that_lacks_a_field_changes_nothing(field: str) -> None:
    trainer = make_trainer()
    before = trainer.state_dict()
    other = before | {"current_step": 7, "kl_coef": 0.7, "best_score": 7.0}
    for broken in (
        {name: value for name, value in other.items() if name != field},
        other | {"scores": {"unknown": 1.0}},
        other | {"kl_coef": NAN},
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            trainer.load_state_dict(broken)
        assert trainer.state_dict() == before


# --- accumulation, piece by piece -----------------------------------------------------------------------------------


def minibatch(trainer: PPOTrainer) -> tuple[Any, ...]:
    """Arguments of ``train_minibatch``."""
    queries, responses, _ = make_batch()
    read = trainer.prepare_model_inputs(queries, responses)
    logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, read)
    assert values is not None
    ones = torch.ones_like(logprobs)
    return logprobs.detach(), values.detach(), logprobs, None, values, mask, ones, ones


def gradients(trainer: PPOTrainer) -> int:
    return sum(parameter.grad is not None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_failed_backward_pass_drops_the_accumulation(count: int) -> None:
    trainer = make_trainer(gradient_accumulation_steps=3)

    def strike(*_: Any) -> None:
        raise MemoryError("full")

    for _ in range(count):
        trainer.train_minibatch(*minibatch(trainer))
    hooked = next(trainer.model.parameters()).register_hook(strike)
    with pytest.raises(MemoryError):
        trainer.train_minibatch(*minibatch(trainer))
    hooked.remove()
    assert gradients(trainer) == 0
    fresh = make_trainer(gradient_accumulation_steps=3)
    for one in (trainer, fresh):
        for _ in range(3):
            one.train_minibatch(*minibatch(one))
    for ours, theirs in zip(trainer.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_taken_over_drops_the_accumulation() -> None:
    trainer = make_trainer(gradient_accumulation_steps=3)
    for _ in range(2):
        trainer.train_minibatch(*minibatch(trainer))
    trainer.load_state_dict(trainer.state_dict())
    assert gradients(trainer) == 0
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train_minibatch(*minibatch(trainer))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_fewer_minibatches_of_an_update_may_be_asked_for_while_some_wait() -> None:
    trainer = make_trainer(gradient_accumulation_steps=3)
    for _ in range(2):
        trainer.train_minibatch(*minibatch(trainer))
    trainer.config.gradient_accumulation_steps = 1
    for updates in (1, 2):
        trainer.train_minibatch(*minibatch(trainer))
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {updates}


def test_an_update_by_pieces_that_is_broken_off_makes_no_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(gradient_accumulation_steps=1)

    def strike(*_: Any) -> None:
        raise MemoryError("full")

    hook = trainer.optimizer.register_step_post_hook(strike)
    with pytest.raises(MemoryError):
        trainer.train_minibatch(*minibatch(trainer))
    hook.remove()
    assert trainer.broken_off == "an update of step 1 was broken off by MemoryError"
    with pytest.raises(ValueError, match="an update of step 1 was broken off by MemoryError"):
        save_checkpoint(trainer, tmp_path / "checkpoint")
    trainer.train_minibatch(*minibatch(trainer))
    assert trainer.broken_off is None
    save_checkpoint(trainer, tmp_path / "checkpoint")


def waiting(trainer: PPOTrainer) -> list[Any]:
    """The gradients that wait for an update, and what is noted of their minibatches."""
    return [[None if p.grad is None else p.grad.clone() for p in trainer.model.parameters()], trainer._pending]


def refused_step(trainer: PPOTrainer, tmp_path: Path) -> None:
    queries, responses, scores = make_batch()
    trainer.step(queries, responses, [*scores[:-1], torch.tensor(NAN)])


def step_broken_off(place: str) -> Callable[[PPOTrainer, Path], None]:
    def attempt(trainer: PPOTrainer, tmp_path: Path) -> None:
        calls: list[int] = []

        def strike(*_: Any) -> None:
            calls.append(1)
            if len(calls) == {"scoring": 1, "forward": 2}[place]:
                raise MemoryError("full")

        hooked = trainer.model.v_head.register_forward_pre_hook(strike)
        try:
            trainer.step(*make_batch())
        finally:
            hooked.remove()

    return attempt


def refused_checkpoint(part: str) -> Callable[[PPOTrainer, Path], None]:
    def attempt(trainer: PPOTrainer, tmp_path: Path) -> None:
        save_checkpoint(make_trainer(gradient_accumulation_steps=3), tmp_path / "c")
        path = tmp_path / "c" / ("rank-0.json" if part == "generators" else "state.json")
        state = json.loads(path.read_text())
        if part == "generators":
            state["dict"] = [[name, 7 if name == "torch" else value] for name, value in state["dict"]]
        else:
            state["trainer"]["dict"] = [[n, "x" if n == "scores" else v] for n, v in state["trainer"]["dict"]]
        path.write_text(json.dumps(state))
        load_checkpoint(trainer, tmp_path / "c")

    return attempt


ATTEMPTS: dict[str, Callable[[PPOTrainer, Path], None]] = {
    "a step refused at the door": refused_step,
    "a step broken off while scoring": step_broken_off("scoring"),
    "a step broken off before its first update": step_broken_off("forward"),
    "a checkpoint with unfit generators": refused_checkpoint("generators"),
    "a checkpoint with an unfit state": refused_checkpoint("trainer"),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_changes_nothing_keeps_the_accumulated_minibatches(attempt: str, count: int, tmp_path: Path) -> None:
    trainer, undisturbed = (make_trainer(gradient_accumulation_steps=3) for _ in range(2))
    for one in (trainer, undisturbed):
        for _ in range(count):
            one.train_minibatch(*minibatch(one))
    before = waiting(trainer)
    with pytest.raises((ValueError, MemoryError)):
        ATTEMPTS[attempt](trainer, tmp_path)
    torch.testing.assert_close(waiting(trainer), before, rtol=0, atol=0)
    for one in (trainer, undisturbed):
        for _ in range(3 - count):
            one.train_minibatch(*minibatch(one))
    for ours, theirs in zip(trainer.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_changes_nothing_keeps_gradients_of_the_users_own(attempt: str, tmp_path: Path) -> None:
    """Made by hand, for an update that the trainer knows nothing of."""
    trainer = make_trainer(gradient_accumulation_steps=3)
    trainer.model.v_head.summary.weight.grad = torch.ones_like(trainer.model.v_head.summary.weight)
    before = waiting(trainer)
    with pytest.raises((ValueError, MemoryError)):
        ATTEMPTS[attempt](trainer, tmp_path)
    torch.testing.assert_close(waiting(trainer), before, rtol=0, atol=0)


def test_a_step_that_has_moved_weights_drops_the_accumulation() -> None:
    """Its gradients are those of other weights."""
    trainer = make_trainer(gradient_accumulation_steps=3, mini_batch_size=1)
    trainer.train_minibatch(*minibatch(trainer))
    trainer.optimizer.step = struck(trainer.optimizer.step, call=2)
    with pytest.raises(RuntimeError, match="struck"):
        trainer.step(*make_batch())
    assert gradients(trainer) == 0
    assert trainer._pending == (0, 0, {})


def recorded(trainer: PPOTrainer, **other: Any) -> dict[str, Any]:
    """Statistics from pieces, some of them exchanged."""
    queries, responses, scores = make_batch()
    pieces = minibatch(trainer)
    stats = trainer.train_minibatch(*pieces)
    data = {"scores": scores, "logprobs": pieces[0], "ref_logprobs": pieces[0], "non_score_reward": pieces[1]}
    data |= {"queries": queries, "responses": responses, "masks": pieces[5], "train_stats": stats}
    return trainer.record_step_stats(0.1, **(data | other))


@pytest.mark.parametrize("kls", [[1.0], torch.zeros(3), torch.zeros(2, 2), "kl", torch.zeros(6, 8, dtype=torch.int64)])
def test_kls_are_looked_at(kls: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="kls"):
        recorded(make_trainer(), kls=kls)
    assert "objective/kl" in untimed(recorded(make_trainer()))


@pytest.mark.parametrize(("size", "queries"), [(6, None), (6, 3), ("six", []), (6, [])])
def test_the_safety_checker_looks_before_it_counts(size: Any, queries: Any) -> None:
    _, responses, scores = make_batch()
    with pytest.raises((TypeError, ValueError), match=r"queries|batch_size"):
        make_trainer()._step_safety_checker(size, queries, responses, scores)


class ReadOnly:
    """A controller of the user's own whose coefficient cannot be set, and is another each time."""

    def __init__(self) -> None:
        self.read = 0

    @property
    def value(self) -> float:
        """The coefficient."""
        self.read += 1
        return 0.01 * self.read

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing."""


def test_an_undo_that_fails_hides_neither_the_error_nor_the_moved_weights(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    trainer.kl_ctl = ReadOnly()
    trainer.optimizer.step = struck(trainer.optimizer.step, call=2)
    with pytest.raises(RuntimeError, match="struck"):
        trainer.step(*make_batch())
    assert "step 1 was broken off by RuntimeError" in str(trainer.broken_off)
    assert "could not be undone whole" in caplog.text


def test_a_step_without_an_update_mends_no_broken_off_weights() -> None:
    trainer = make_trainer()
    trainer.optimizer.step, real = struck(trainer.optimizer.step, call=2), trainer.optimizer.step
    with pytest.raises(RuntimeError, match="struck"):
        trainer.step(*make_batch())
    trainer.optimizer.step = real
    queries, responses, scores = make_batch()
    trainer.step(queries, responses, scores, [torch.zeros_like(response) for response in responses])
    assert trainer.broken_off is not None
    trainer.step(*make_batch())
    assert trainer.broken_off is None


def test_parameters_of_the_users_are_stepped_on_no_stale_gradient() -> None:
    trainer = make_trainer()
    extra = torch.nn.Parameter(torch.ones(()))
    extra.grad = torch.ones(())
    trainer.optimizer.add_param_group({"params": [extra]})
    trainer.step(*make_batch())
    assert float(extra.detach()) == 1.0


def struck(step: Callable[..., Any], *, call: int) -> Callable[..., Any]:
    """An optimiser's step that raises at one of its calls."""
    calls: list[int] = []

    def strike(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("struck")
        return step(*args, **kwargs)

    return strike
