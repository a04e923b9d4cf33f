"""What must never reach the weights: numbers that are not finite, updates without a token, steps broken off."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppo_core.averages import Average
from ppo_runtime import PPOConfig, PPOTrainer
from ppo_runtime.checkpoint import save_checkpoint
from ppo_runtime.learning import inspection, update
from ppo_runtime.learning.guards import PATIENCE, Cause, cause_in_losses, clip_gradients, seen_in_losses
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

NAN, INF = float("nan"), float("inf")


def snapshot(trainer: PPOTrainer) -> dict[str, Any]:
    """Everything that a step changes, copied."""
    return copy.deepcopy(
        {
            "weights": dict(trainer.model.named_parameters()),
            "optimizer": trainer.optimizer.state_dict()["state"],
            # A gradient of zeros is none.
            "gradients": [p.grad if p.grad is not None and p.grad.any() else None for p in trainer.model.parameters()],
            "trainer": trainer.state_dict(),
            "shuffle": trainer.shuffle.get_state(),
            "scheduler": None if trainer.lr_scheduler is None else trainer.lr_scheduler.state_dict(),
        }
    )


def assert_unchanged(trainer: PPOTrainer, before: dict[str, Any]) -> None:
    torch.testing.assert_close(snapshot(trainer), before, rtol=0, atol=0, equal_nan=True)


def spoil_gradients(trainer: PPOTrainer, value: float, *, only: int | None = None) -> None:
    """One entry of a gradient becomes ``value`` in every backward pass, or in that one only."""
    passes = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if only is not None and passes != only + 1:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = value
        return spoiled

    next(iter(trainer.model.v_head.parameters())).register_hook(hook)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_leaves_weights_and_moments(
    value: float, max_grad_norm: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_grad_norm=max_grad_norm)
    trainer.step(*make_batch())
    spoil_gradients(trainer, value)
    before = snapshot(trainer)
    stats = trainer.step(*make_batch(seed=1))
    after = snapshot(trainer)
    for part in ("weights", "optimizer", "gradients"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert stats["ppo/policy/skipped_updates"] == 12
    trainer.step(*make_batch(seed=2))
    (said,) = [text for record in caplog.records if "left out:" in (text := record.getMessage())]
    assert "gradient" in said, "once, however often it happens"


def test_one_bad_update_costs_that_update_alone() -> None:
    trainer = make_trainer()
    spoil_gradients(trainer, NAN, only=3)
    stats = trainer.step(*make_batch())
    assert stats["ppo/policy/skipped_updates"] == 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert stats["ppo/policy/grad_norm"] > 0


@pytest.mark.parametrize("value", [2e19, 1e30, -3e38])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_finite_gradient_never_makes_a_weight_nan(value: float, max_grad_norm: float | None) -> None:
    """Its square overflows: clipped all the same where clipping is asked for, left out where not."""
    trainer = make_trainer(max_grad_norm=max_grad_norm)
    trainer.step(*make_batch())
    spoil_gradients(trainer, value)
    before = copy.deepcopy(trainer.model.state_dict())
    stats = trainer.step(*make_batch(seed=1))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for entry in trainer.optimizer.state.values():
        assert all(torch.as_tensor(moment).isfinite().all() for moment in entry.values())
    moved = any(not torch.equal(x, before[name]) for name, x in trainer.model.state_dict().items())
    assert moved == (max_grad_norm is not None)
    assert stats["ppo/policy/skipped_updates"] == (12 if max_grad_norm is None else 0)
    if max_grad_norm is not None:
        assert stats["ppo/policy/grad_norm"] == pytest.approx(abs(value), rel=1e-3)


class WithoutFloat64(TorchDispatchMode):
    """Stands for a device that has no float64, such as MPS: nothing becomes one that was none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = func(*args, **(kwargs or {}))
        made = [x.dtype for x in tree_leaves(found) if isinstance(x, Tensor)]
        mixed = torch.float64 in (*made, *given) and any(dtype != torch.float64 for dtype in given)
        if mixed or (kwargs or {}).get("dtype") is torch.float64:
            raise TypeError(f"{func}: this device has no float64")
        return found


def parameters_with(*gradients: Tensor) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


LARGE = {
    "one": (2e19,),
    "largest": (3.38e38,) * 5,
    "with small ones": (1e30, 1.0, -1e-30, 0.0),
    "among others": (-1e25, 3e24, 1.0),
}


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_an_overflowing_norm_needs_no_float64(case: str, dtype: torch.dtype, max_norm: float) -> None:
    gradients = [torch.tensor([value, 1.0]).to(dtype) for value in LARGE[case]]
    exact = [gradient.double() for gradient in gradients]
    norm = torch.stack([gradient.norm() for gradient in exact]).norm()
    parameters = parameters_with(*gradients)
    with WithoutFloat64():
        found, cause = clip_gradients(parameters, max_norm)
    assert cause is Cause.NONE
    assert float(found) == pytest.approx(float(norm), rel=1e-6)
    for parameter, gradient in zip(parameters, exact, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        wanted = gradient * (max_norm / float(norm))
        # What is 2**80 times smaller than the largest may come out as 0.
        torch.testing.assert_close(
            parameter.grad.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=max_norm * 2.0**-80
        )


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_told_from_a_large_one_without_float64(
    value: float, max_norm: float | None
) -> None:
    parameters = parameters_with(torch.tensor([1e30, 1.0]), torch.tensor([value]), torch.tensor([3e38]))
    before = copy.deepcopy([parameter.grad for parameter in parameters])
    with WithoutFloat64():
        assert clip_gradients(parameters, max_norm)[1] is Cause.GRADIENT
    torch.testing.assert_close([parameter.grad for parameter in parameters], before, equal_nan=True)


@pytest.mark.parametrize("max_norm", [None, 1e20, 1e30, 3e38, 1e300])
def test_a_bound_above_which_squares_overflow_is_none(max_norm: float | None) -> None:
    """An optimiser's moments would overflow under it, and stay so."""
    gradients = [torch.tensor([1e25, 1.0])]
    parameters = parameters_with(*gradients)
    assert clip_gradients(parameters, max_norm)[1] is Cause.OVERFLOW
    assert parameters[0].grad is not None
    assert torch.equal(parameters[0].grad, gradients[0])


def test_gradients_in_float64_are_clipped_in_float64() -> None:
    parameters = parameters_with(torch.tensor([1e200, 1e199], dtype=torch.float64))
    found, cause = clip_gradients(parameters, 2.0)
    assert cause is Cause.NONE
    assert float(found) == pytest.approx(1e200 * 1.01**0.5, rel=1e-12)
    assert parameters[0].grad is not None
    assert float(parameters[0].grad.norm()) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1e3])
def test_an_ordinary_norm_is_torchs_own_bit_for_bit(max_norm: float | None) -> None:
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    ours, theirs = parameters_with(*gradients), parameters_with(*gradients)
    with WithoutFloat64():
        norm, cause = clip_gradients(ours, max_norm)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(theirs, max_norm, wanted)
    assert cause is Cause.NONE
    assert torch.equal(norm, wanted)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=0, atol=0)


def test_without_a_bound_gradients_are_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scaled")

    for name in ("clip_grad_norm_", "clip_grads_with_norm_"):
        monkeypatch.setattr(torch.nn.utils, name, refuse)
    make_trainer(max_grad_norm=None).step(*make_batch())


@pytest.mark.parametrize("field", ["advantages", "old_logprobs", "old_values", "returns"])
def test_a_loss_that_is_not_finite_leaves_weights_and_moments(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.step(*make_batch())
    before = snapshot(trainer)
    minibatch = update.minibatch_losses

    def spoiled(now: Any, part: Any, targets: update.Targets, *args: Any) -> Any:
        return minibatch(now, part, targets._replace(**{field: targets._asdict()[field] * NAN}), *args)

    monkeypatch.setattr(update, "minibatch_losses", spoiled)
    stats = trainer.step(*make_batch(seed=1))
    after = snapshot(trainer)
    for part in ("weights", "optimizer", "gradients"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert stats["ppo/policy/skipped_updates"] == 12


@pytest.mark.parametrize("rows", [slice(None), slice(0, 2)], ids=["no token at all", "an update without one"])
def test_an_update_without_a_kept_token_does_not_step_on_stale_momentum(rows: slice) -> None:
    trainer = make_trainer(mini_batch_size=1)
    trainer.step(*make_batch())
    queries, responses, scores = make_batch(seed=1)
    masks = [torch.ones(len(response)) for response in responses]
    for mask in masks[rows]:
        mask.zero_()
    steps: list[int] = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    before = snapshot(trainer)
    stats = trainer.step(queries, responses, scores, masks)
    empty = len(masks[rows])
    assert len(steps) == 4 * (6 - empty)
    assert stats["ppo/policy/skipped_updates"] == 4 * empty
    assert all(torch.as_tensor(value).isfinite().all() for value in stats.values())
    if empty == 6:
        after = snapshot(trainer)
        for part in ("weights", "optimizer"):
            torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)


# --- refused before the update --------------------------------------------------------------------------------


def _spoil_value_head(trainer: PPOTrainer) -> None:
    with torch.no_grad():
        trainer.model.v_head.summary.bias.fill_(NAN)


def _spoil_reference(trainer: PPOTrainer) -> None:
    """Not finite for the token 50 alone."""
    with torch.no_grad():
        trainer.ref_model.lm_head.weight[50] = NAN


def _spoil_policy(trainer: PPOTrainer) -> None:
    with torch.no_grad():
        trainer.model.pretrained_model.lm_head.weight[:, 0] = INF


def _large_values(trainer: PPOTrainer) -> None:
    with torch.no_grad():
        trainer.model.v_head.summary.bias.fill_(1e20)


def _score(value: float) -> Callable[[list[Tensor]], list[Any]]:
    return lambda scores: [*scores[:2], value, *scores[3:]]


def _same(scores: list[Tensor]) -> list[Tensor]:
    return scores


REFUSED: dict[str, tuple[Callable[[PPOTrainer], None] | None, Callable[[list[Tensor]], list[Any]], str]] = {
    "value head": (_spoil_value_head, _same, r"responses\[0\].*value.* is nan"),
    "policy": (_spoil_policy, _same, r"responses\[0\].*policy.* is nan"),
    "reference": (_spoil_reference, _same, r"reference.* is nan"),
    "large values": (_large_values, _same, r"value.*1e\+20.*overflow"),
    "score 1e19": (None, _score(1e19), r"scores\[2\] is 1e\+19.*below"),
    "score -1e20": (None, _score(-1e20), r"scores\[2\] is -1e\+20.*below"),
    "score 1e38": (None, _score(1e38), r"scores\[2\] is 1e\+38.*below"),
    "score 1e39": (None, _score(1e39), r"scores\[2\] is 1e\+39"),
    "score 1e400": (None, lambda scores: [*scores[:2], 10**400, *scores[3:]], r"scores\[2\] is"),
}


@pytest.mark.parametrize("settings", [{}, {"use_score_scaling": True, "whiten_rewards": True}], ids=["plain", "scaled"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_named_and_changes_nothing(case: str, settings: dict[str, Any]) -> None:
    spoil, change, message = REFUSED[case]
    trainer = make_trainer(ref_model=tiny_model("llama", seed=1), **settings)
    trainer.step(*make_batch())
    if spoil is not None:
        spoil(trainer)
    queries, responses, scores = make_batch(seed=1)
    before = snapshot(trainer)
    if settings and case in ("score 1e19", "score -1e20", "score 1e38"):
        trainer.step(queries, responses, change(scores))  # divided by their running deviation, they are small
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
        return
    with pytest.raises(ValueError, match=message):
        trainer.step(queries, responses, change(scores))
    assert_unchanged(trainer, before)


# --- broken off -------------------------------------------------------------------------------------------------


def _raise_at(call: int, error: BaseException) -> Callable[..., None]:
    calls = 0

    def strike(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    return strike


def _strike_scoring(trainer: PPOTrainer, error: BaseException) -> None:
    assert trainer.ref_model is not None
    trainer.ref_model.pretrained_model.base_model.register_forward_pre_hook(_raise_at(1, error))


def _strike_first_forward(trainer: PPOTrainer, error: BaseException) -> None:
    trainer.model.v_head.register_forward_pre_hook(_raise_at(2, error))  # the first one scores


def _strike_backward(trainer: PPOTrainer, error: BaseException) -> None:
    strike = _raise_at(1, error)

    def hook(gradient: Tensor) -> Tensor:
        strike()
        return gradient

    trainer.model.v_head.summary.weight.register_hook(hook)


def _strike_update(number: int) -> Callable[[PPOTrainer, BaseException], None]:
    def strike(trainer: PPOTrainer, error: BaseException) -> None:
        trainer.optimizer.register_step_pre_hook(_raise_at(number, error))

    return strike


def _strike_later_forward(trainer: PPOTrainer, error: BaseException) -> None:
    trainer.model.v_head.register_forward_pre_hook(_raise_at(6, error))


def _strike_statistics(trainer: PPOTrainer, error: BaseException) -> None:
    vars(trainer)["_update_controller"] = _raise_at(1, error)  # stands for whatever comes late


# What is struck, and how many steps of the optimiser have begun by then.
STRIKES: dict[str, tuple[Callable[[PPOTrainer, BaseException], None], int]] = {
    "scoring": (_strike_scoring, 0),
    "first forward": (_strike_first_forward, 0),
    "backward": (_strike_backward, 0),
    "inside an optimiser step": (_strike_update(3), 3),
    "a later forward": (_strike_later_forward, 4),
    "statistics": (_strike_statistics, 12),
}


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("place", STRIKES)
def test_a_step_that_breaks_off_is_undone_or_says_that_it_cannot_be(
    place: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strike, begun = STRIKES[place]
    trainer = make_trainer(use_score_scaling=True)
    trainer.step(*make_batch())
    strike(trainer, error)
    before = snapshot(trainer)
    with pytest.raises(type(error)):
        trainer.step(*make_batch(seed=1))
    if not begun:
        assert trainer.broken_off is None
        assert_unchanged(trainer, before)
    else:
        after = snapshot(trainer)
        for part in ("gradients", "trainer", "shuffle"):
            torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
        said = f"step 2 was broken off by {type(error).__name__} after {begun} steps of the optimiser"
        assert trainer.broken_off == said
        assert said in caplog.text
        with pytest.raises(ValueError, match=f"{said}.*no checkpoint"):
            save_checkpoint(trainer, tmp_path / "checkpoint")
        trainer.save_pretrained(tmp_path / "model")
        assert said in (tmp_path / "model" / "README.md").read_text()
    vars(trainer).pop("_update_controller", None)
    trainer.step(*make_batch(seed=1))
    assert trainer.broken_off is None
    assert trainer.current_step == 2
    save_checkpoint(trainer, tmp_path / "checkpoint")
    trainer.save_pretrained(tmp_path / "model")
    assert "broken off" not in (tmp_path / "model" / "README.md").read_text()


def test_a_step_undone_can_be_made_again_bit_for_bit() -> None:
    straight, struck = (make_trainer(use_score_scaling=True) for _ in range(2))
    _strike_first_forward(struck, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        struck.step(*make_batch())
    expected, found = straight.step(*make_batch()), struck.step(*make_batch())
    torch.testing.assert_close(untimed(found), untimed(expected), rtol=0, atol=0)
    torch.testing.assert_close(snapshot(struck)["weights"], snapshot(straight)["weights"], rtol=0, atol=0)


def test_only_the_optimisers_own_parameters_count_in_the_norm_and_no_gradient_piles_up() -> None:
    """An optimiser of the value head alone: the trunk's gradients are cleared and do not shrink the step."""
    trainer = make_trainer(
        max_grad_norm=1e-3, optimizer_of=lambda model: torch.optim.SGD(model.v_head.parameters(), 1.0)
    )
    norms: list[float] = []

    def record(*_: Any) -> None:
        gradients = [parameter.grad for parameter in trainer.model.v_head.parameters()]
        norms.append(float(torch.nn.utils.get_total_norm([x for x in gradients if x is not None])))

    trainer.optimizer.register_step_pre_hook(record)
    trainer.step(*make_batch())
    assert norms == pytest.approx([1e-3] * 12, rel=1e-2)
    assert not any(parameter.grad.any() for parameter in trainer.model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_a_checkpoint_that_is_not_finite_is_never_written_over_a_good_one(what: str, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.step(*make_batch())
    path = save_checkpoint(trainer, tmp_path / "checkpoint")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    weight = trainer.model.v_head.summary.weight
    with torch.no_grad():
        (weight if what == "weights" else trainer.optimizer.state[weight]["exp_avg_sq"]).view(-1)[3] = NAN
    with pytest.raises(ValueError, match=r"(v_head\.summary\.weight|exp_avg_sq) holds numbers that are not finite"):
        save_checkpoint(trainer, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


# --- kept for inspection ------------------------------------------------------------------------------------------


def _kept(home: Path) -> dict[str, dict[str, Any]]:
    """What lies there, by the names of the files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(home.glob("not-finite/*.json"))}


def test_a_batch_whose_update_was_left_out_can_be_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)}, task_name="hf_" + "s" * 20)
    spoil_gradients(trainer, NAN, only=1)
    queries, responses, scores = make_batch()
    trainer.step(queries, responses, scores)
    (record,) = _kept(tmp_path).values()
    path = tmp_path / "not-finite" / "step-1.safetensors"
    assert f"the batch of step 1 is kept for inspection in {path} (look at it with safetensors" in caplog.text
    assert (record["step"], record["rank"], len(record["rows"])) == (1, 0, 2)
    assert "gradient is not finite" in record["why"]
    assert record["found"]["logprobs"]["not_finite"] == 0
    assert record["settings"]["kl_penalty"] == "kl"
    assert "ssss" not in path.with_suffix(".json").read_text()
    kept = load_file(path)
    for name, rows in {"queries": queries, "responses": responses}.items():
        for row, stored in zip(rows, kept[name], strict=True):
            assert stored[stored != record["padding"][name]].tolist() == row.tolist()
    assert kept["given_scores"].float().tolist() == torch.stack(scores).tolist()
    assert {"logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns", "mask"} <= kept.keys()


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_was_refused_can_be_looked_at(case: str, tmp_path: Path) -> None:
    spoil, change, message = REFUSED[case]
    trainer = make_trainer(ref_model=tiny_model("llama", seed=1), project_kwargs={"logging_dir": str(tmp_path)})
    if spoil is not None:
        spoil(trainer)
    queries, responses, scores = make_batch(seed=1)
    with pytest.raises(ValueError, match=message):
        trainer.step(queries, responses, change(scores))
    (record,) = _kept(tmp_path).values()
    assert re.search(message, record["why"])
    assert record["rows"] is None
    kept = load_file(tmp_path / "not-finite" / "step-1.safetensors")
    assert len(kept["queries"]) == len(kept["given_scores"]) == 6
    if "value" in case or case in ("policy", "reference"):
        name = {"policy": "logprobs", "reference": "ref_logprobs"}.get(case, "values")
        assert record["found"][name]["not_finite"] == int((~kept[name].isfinite()).sum())
        assert (record["found"][name]["not_finite"] > 0) == (case != "large values")


def test_an_empty_update_is_kept_as_well(tmp_path: Path) -> None:
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    queries, responses, scores = make_batch()
    trainer.step(queries, responses, scores, [torch.zeros(len(response)) for response in responses])
    (record,) = _kept(tmp_path).values()
    assert "keep none of its tokens" in record["why"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_speaks_for_all_but_each_of_what_it_has_kept(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError

    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    spoil_gradients(trainer, NAN, only=1)
    monkeypatch.setattr(trainer.kl_ctl, "update", refuse)
    trainer.model.pretrained_model.requires_grad_(False)
    trainer.generate(torch.tensor([5]), max_new_tokens=1, do_sample=True, top_k=1)
    trainer.step(*make_batch())
    assert list(_kept(tmp_path)) == ["step-1"]
    of_all = ["top_k", "nothing of the language model", "KL controller kept", "left out"]
    expected = [*of_all * (1 - rank), "kept for inspection"]
    assert [text for text, said in zip(expected, caplog.messages, strict=False) if text in said] == expected
    assert len(caplog.messages) == len(expected)


def test_a_few_batches_are_kept_and_none_of_what_is_merely_wrong(tmp_path: Path) -> None:
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    queries, responses, scores = make_batch()
    with pytest.raises(ValueError, match="entries"):
        trainer.step(queries, responses, scores[1:])
    assert not _kept(tmp_path)
    for step in range(5):
        with pytest.raises(ValueError, match="is nan"):
            trainer.step(queries, responses, [NAN, *scores[1:]])
        trainer.step(*make_batch(seed=step))
    assert list(_kept(tmp_path)) == ["step-1", "step-2", "step-3"]


def test_a_whole_step_stays_one_where_the_keeping_of_its_batch_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    spoil_gradients(trainer, NAN, only=1)
    with monkeypatch.context() as patched:
        patched.setattr(inspection, "keep_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.step(*make_batch())
    assert trainer.current_step == 1
    assert trainer.broken_off is None
    save_checkpoint(trainer, tmp_path / "checkpoint")
    trainer.step(*make_batch(seed=1))
    assert trainer.current_step == 2


def test_what_cannot_be_kept_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "not-finite").touch()
    trainer = make_trainer(project_kwargs={"logging_dir": str(tmp_path)})
    spoil_gradients(trainer, NAN, only=1)
    assert trainer.step(*make_batch())["ppo/policy/skipped_updates"] == 1
    assert "the batch of step 1 could not be kept for inspection" in caplog.text


def test_a_trainer_without_a_directory_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    spoil_gradients(trainer, NAN, only=1)
    trainer.step(*make_batch())
    assert not list(tmp_path.iterdir())
    assert "name one with project_kwargs" in caplog.text


# --- stop or go on ------------------------------------------------------------------------------------------------


def test_stopping_at_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """At the first update of a step nothing has changed; a later one leaves those before it."""
    trainer = make_trainer(on_nonfinite="stop", project_kwargs={"logging_dir": str(tmp_path)})
    trainer.step(*make_batch())
    before = snapshot(trainer)
    spoil_gradients(trainer, NAN)
    with pytest.raises(ValueError, match=r"on_nonfinite is 'stop': its gradient is not finite"):
        trainer.step(*make_batch(seed=1))
    assert_unchanged(trainer, before)
    assert trainer.broken_off is None
    (record,) = _kept(tmp_path).values()
    assert record["step"] == 2
    assert len(record["rows"]) == 2
    later = make_trainer(on_nonfinite="stop")
    spoil_gradients(later, NAN, only=3)
    with pytest.raises(ValueError, match="on_nonfinite is 'stop'"):
        later.step(*make_batch())
    assert "after 3 steps of the optimiser" in str(later.broken_off)
    assert all(parameter.isfinite().all() for parameter in later.model.parameters())


def test_an_update_beyond_the_threshold_or_without_a_token_is_no_reason_to_stop() -> None:
    trainer = make_trainer(on_nonfinite="stop", ratio_threshold=1e-6)
    assert trainer.step(*make_batch())["ppo/policy/skipped_updates"] == 12


@pytest.mark.parametrize("on_nonfinite", ["skip", "drop"])
def test_steps_that_are_all_in_vain_come_to_an_end(on_nonfinite: str) -> None:
    trainer = make_trainer(ppo_epochs=1, mini_batch_size=6, on_nonfinite=on_nonfinite)
    spoil_gradients(trainer, NAN)
    for _ in range(PATIENCE - 1):
        assert trainer.step(*make_batch())["ppo/policy/skipped_updates"] == 1
    before = snapshot(trainer)
    with pytest.raises(
        ValueError, match=r"10 steps in a row had to leave out all their updates, the last one since its"
    ):
        trainer.step(*make_batch())
    assert_unchanged(trainer, before)
    assert trainer.current_step == PATIENCE - 1


def test_an_update_in_between_shows_that_it_is_not_in_vain() -> None:
    trainer = make_trainer(ppo_epochs=1, mini_batch_size=6)
    spoiled = [True]
    next(iter(trainer.model.v_head.parameters())).register_hook(lambda gradient: gradient * (NAN if spoiled[0] else 1))
    for step in range(2 * PATIENCE):
        spoiled[0] = step != PATIENCE - 2
        if step == 2 * PATIENCE - 2:
            break
        trainer.step(*make_batch())
    assert trainer.current_step == 2 * PATIENCE - 2


def told(ratio: float, tokens: float, other: float = 0.0) -> Tensor:
    """What a rank tells of an update with this mean ratio over so many tokens."""
    said = {name: Average(torch.tensor(other), torch.tensor(tokens)) for name in ("ppo/loss/policy", "ppo/loss/value")}
    return seen_in_losses(said | {"ppo/policy/ratio": Average(torch.tensor(ratio * tokens), torch.tensor(tokens))})


def test_the_ratio_that_leaves_an_update_out_is_the_mean_over_all_ranks() -> None:
    """A rank with few rows, far off, is not an update that is far off."""
    config = PPOConfig(ratio_threshold=1.5)
    near, far = told(1.0, 8.0), told(2.0, 2.0)
    assert cause_in_losses(far[None], config) is Cause.FAR
    assert cause_in_losses(torch.stack((near, far)), config) is Cause.NONE
    assert cause_in_losses(torch.stack((far, near)), attrs.evolve(config, ratio_threshold=1.15)) is Cause.FAR


@pytest.mark.parametrize("loss", [INF, NAN])
@pytest.mark.parametrize("ratio", [1.0, 20.0, INF])
def test_a_loss_that_is_not_finite_is_no_ratio_above_the_threshold(ratio: float, loss: float) -> None:
    assert cause_in_losses(told(ratio, 8.0, loss)[None], PPOConfig()) is Cause.LOSS


def test_a_ratio_that_has_overflown_is_above_the_threshold() -> None:
    """Where the loss is finite, since the ratio is clipped."""
    assert cause_in_losses(told(INF, 8.0)[None], PPOConfig()) is Cause.FAR
    assert cause_in_losses(told(NAN, 8.0)[None], PPOConfig()) is Cause.LOSS


def test_a_loss_of_one_rank_that_is_not_finite_counts_for_all() -> None:
    for spoiled in (float("inf"), float("nan")):
        seen = torch.stack((told(1.0, 8.0), told(1.0, 8.0, spoiled)))
        assert cause_in_losses(seen, PPOConfig()) is Cause.LOSS
        assert not seen[:, -1].isfinite().all()
