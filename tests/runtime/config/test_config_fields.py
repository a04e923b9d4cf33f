"""Every field of PPOConfig does what it says, or is refused with what to use instead.

``COVERED`` names, field by field, the test that would fail if the field were dead; a field that is missing there
fails the walk below.
"""

import logging
import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from ppo_runtime import PPOConfig, assembly
from ppo_runtime.accel.backends import AccelChoice
from ppo_runtime.learning import forward as forward_module
from ppo_runtime.learning import update as update_module
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer

COVERED: dict[str, str] = {
    "exp_name": "test_config_fields.test_the_runs_name_and_directories",
    "seed": "test_data.test_an_epoch_is_a_permutation_and_the_next_is_another",
    "log_with": "test_tracking_wandb.test_wandb_offline",
    "remove_unused_columns": "test_data.test_unused_columns_go_unless_they_are_wanted",
    "drop_last": "test_data.test_drop_last_leaves_out_other_rows_in_every_epoch",
    "tracker_kwargs": "test_tracking_wandb.test_wandb_gets_steps_curves_table_and_configuration",
    "accelerator_kwargs": "test_config_fields.test_what_cannot_be_honoured_says_what_to_use",
    "project_kwargs": "test_config_fields.test_the_runs_name_and_directories",
    "tracker_project_name": "test_tracking_wandb.test_wandb_gets_steps_curves_table_and_configuration",
    "push_to_hub_if_best_kwargs": "test_config_fields.test_the_best_policy_by_raw_scores_is_uploaded",
    "compare_steps": "test_config_fields.test_comparing_every_other_step",
    "use_habana": "test_config_fields.test_what_cannot_be_honoured_says_what_to_use",
    "accel": "test_config_fields.test_accel_chooses_the_backend",
    "accel_strict": "test_config_fields.test_accel_chooses_the_backend",
    "device": "test_placing.test_a_device_that_is_named_is_taken",
    "ranks_timeout": "test_lost_ranks.test_a_rank_that_does_not_come_is_named_when_the_time_is_over",
    "parallelism": "test_sharded.test_each_rank_holds_half_of_models_and_moments",
    "steps": "test_config.test_derived_sizes",
    "learning_rate": "test_config_fields.test_a_smaller_learning_rate_moves_less",
    "batch_size": "test_trainer.test_bad_input_is_named_and_loses_nothing",
    "mini_batch_size": "test_config_fields.test_sizes_of_passes_and_updates",
    "gradient_accumulation_steps": "test_config_fields.test_sizes_of_passes_and_updates",
    "ppo_epochs": "test_config_fields.test_sizes_of_passes_and_updates",
    "max_grad_norm": "test_config_fields.test_every_update_is_clipped",
    "optimize_device_cache": "test_config_fields.test_the_device_cache_is_emptied_after_every_step",
    "early_stopping": "test_config_fields.test_early_stopping_leaves_out_epochs",
    "target_kl": "test_config_fields.test_early_stopping_leaves_out_epochs",
    "ratio_threshold": "test_config_fields.test_an_update_beyond_the_ratio_threshold_is_left_out",
    "on_nonfinite": "test_guards.test_stopping_at_numbers_that_are_not_finite",
    "adap_kl_ctrl": "test_config_fields.test_the_controllers",
    "init_kl_coef": "test_config_fields.test_the_controllers",
    "kl_penalty": "test_config_fields.test_the_four_penalties",
    "target": "test_config_fields.test_the_controllers",
    "horizon": "test_config_fields.test_the_controllers",
    "gamma": "test_config_fields.test_the_objectives_numbers_matter",
    "lam": "test_config_fields.test_the_objectives_numbers_matter",
    "cliprange": "test_config_fields.test_the_objectives_numbers_matter",
    "cliprange_value": "test_config_fields.test_the_objectives_numbers_matter",
    "vf_coef": "test_config_fields.test_the_objectives_numbers_matter",
    "use_score_scaling": "test_config_fields.test_scores_are_scaled_by_running_moments",
    "use_score_norm": "test_config_fields.test_scores_are_scaled_by_running_moments",
    "score_clip": "test_config_fields.test_scores_are_clipped",
    "whiten_rewards": "test_config_fields.test_rewards_are_whitened",
    "pad_for_acceleration": "test_config_fields.test_static_padding_changes_shapes_and_nothing_else",
    "pad_max_len": "test_config_fields.test_static_padding_changes_shapes_and_nothing_else",
    "pad_max_input_len": "test_config_fields.test_static_padding_of_prompts_in_generation",
}
NOT_TESTED = {
    "task_name": "a label that goes to the trackers with the other settings; nothing reads it",
    "model_name": "a label, as above: the model itself is an argument",
    "query_dataset": "a label, as above: the dataset itself is an argument",
    "reward_model": "a label, as above: scores are an argument of step",
    "is_encoder_decoder": "set by the trainer; test_api looks at it",
    "is_peft_model": "set by the trainer; test_api looks at it",
}


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(PPOConfig)])
def test_every_field_has_a_test_or_a_reason(field: str) -> None:
    if field in NOT_TESTED:
        assert field not in COVERED
        return
    module, test = COVERED[field].split(".")
    (path,) = Path(__file__).parents[1].rglob(f"{module}.py")
    assert re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE)


# --- the run -------------------------------------------------------------------------------------------------


def test_the_runs_name_and_directories(tmp_path: Path) -> None:
    assert PPOConfig(exp_name="mine").logging_dir == Path("runs") / "mine"
    assert PPOConfig(project_kwargs={"logging_dir": tmp_path}).logging_dir == tmp_path
    assert PPOConfig(project_kwargs={"project_dir": str(tmp_path)}).logging_dir == tmp_path
    with pytest.raises(ValueError, match="project_kwargs has 'total_limit', expected 'logging_dir'"):
        PPOConfig(project_kwargs={"total_limit": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_habana": True}, "no Habana backend; leave it False"),
        ({"accelerator_kwargs": {"cpu": True}}, "start the script with torchrun"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "expected 'repo_id' among them"),
        ({"pad_for_acceleration": True}, "pad_max_len is 0"),
        ({"pad_max_len": 1.5}, "pad_max_len is 1.5, expected an integer"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_honoured_says_what_to_use(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


@pytest.mark.parametrize("accel", ["auto", "eager", "ipex", "onednn", "compile"])
@pytest.mark.parametrize("strict", [False, True])
def test_accel_chooses_the_backend(accel: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request arrives where backends are chosen; test_accel has what comes of it."""
    asked: list[tuple[str, bool]] = []

    def choose(requested: str, *, strict: bool) -> AccelChoice:
        asked.append((requested, strict))
        return AccelChoice(requested="eager", strict=strict, backend="eager", reason="as the test has it", versions={})

    monkeypatch.setattr(assembly, "choose", choose)
    assert make_trainer(accel=accel, accel_strict=strict).acceleration.reason == "as the test has it"
    assert asked == [(accel, strict)]


def _uploads(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    pushed: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: pushed.append((trainer.current_step, kwargs)))
    return pushed


def _run(trainer: Any, means: list[float]) -> None:
    queries, responses, scores = make_batch()
    for mean in means:
        trainer.step(queries, responses, [score - torch.stack(scores).mean() + mean for score in scores])


def test_the_best_policy_by_raw_scores_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled scores shrink as the running deviation grows, so that the best by those is another one."""
    trainer = make_trainer(
        push_to_hub_if_best_kwargs={"repo_id": "a/b", "private": True},
        use_score_scaling=True,
        use_score_norm=True,
        ppo_epochs=1,
    )
    pushed = _uploads(trainer, monkeypatch)
    _run(trainer, [5.0, 4.0, 6.0, 6.5, 6.4])
    assert pushed == [(step, {"repo_id": "a/b", "private": True}) for step in (0, 2, 3)]
    assert trainer.best_score == pytest.approx(6.5, abs=1e-5)
    assert trainer.state_dict()["best_score"] == trainer.best_score


def test_the_best_score_so_far_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "a/b"}, ppo_epochs=1)
    pushed = _uploads(trainer, monkeypatch)
    trainer.best_score = 3.0
    _run(trainer, [2.0, 4.0])
    trainer.best_score = None
    _run(trainer, [1.0])
    assert [step for step, _ in pushed] == [1, 2]
    assert trainer.best_score == pytest.approx(1.0, abs=1e-5)


def test_comparing_every_other_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "a/b"}, compare_steps=2, ppo_epochs=1)
    pushed = _uploads(trainer, monkeypatch)
    _run(trainer, [1.0, 9.0, 2.0, 9.0, 1.5])
    assert [step for step, _ in pushed] == [0, 2]


def test_what_is_uploaded_is_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            uploaded["private"] = kwargs["private"]
            return type("Url", (), {"repo_id": f"someone/{repo_id}"})()

        def upload_folder(self, **kwargs: Any) -> str:
            uploaded.update(kwargs, files={path.name for path in Path(kwargs["folder_path"]).iterdir()})
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    trainer = make_trainer()
    assert trainer.push_to_hub("policy", private=True, token="secret") == "done"
    assert uploaded["repo_id"] == "someone/policy"
    assert (uploaded["private"], uploaded["token"]) == (True, "secret")
    assert {"model.safetensors", "value_head.safetensors", "README.md", "tokenizer.json"} <= uploaded["files"]


def test_an_upload_that_fails_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "a/b"}, ppo_epochs=1)

    def fail(**_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(trainer, "push_to_hub", fail)
    with caplog.at_level(logging.WARNING):
        _run(trainer, [5.0])
    assert "could not be uploaded: no network" in caplog.text
    assert trainer.current_step == 1
    pushed = _uploads(trainer, monkeypatch)
    _run(trainer, [4.0])
    assert [step for step, _ in pushed] == [1]


# --- the optimisation ----------------------------------------------------------------------------------------


def _moved(trainer: Any) -> float:
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.step(*make_batch())
    pairs = zip(before, trainer.model.parameters(), strict=True)
    return sum(float((new.detach() - old).abs().sum()) for old, new in pairs)


def test_a_smaller_learning_rate_moves_less() -> None:
    assert _moved(make_trainer(learning_rate=1e-5)) < 0.1 * _moved(make_trainer(learning_rate=1e-3))


@pytest.mark.parametrize(
    ("mini_batch_size", "accumulation", "epochs", "passes", "updates"),
    [(2, 1, 1, 3, 3), (1, 3, 2, 12, 4), (6, 1, 3, 3, 3)],
)
def test_sizes_of_passes_and_updates(
    mini_batch_size: int, accumulation: int, epochs: int, passes: int, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(mini_batch_size=mini_batch_size, gradient_accumulation_steps=accumulation, ppo_epochs=epochs)
    sizes: list[int] = []
    evaluate = update_module.evaluate

    def recording(model: Any, rows: Any) -> Any:
        sizes.append(len(rows.mask))
        return evaluate(model, rows)

    monkeypatch.setattr(update_module, "evaluate", recording)
    stats = trainer.step(*make_batch())
    assert sizes == [mini_batch_size] * passes
    assert next(iter(trainer.optimizer.state.values()))["step"] == updates
    assert stats["ppo/policy/epochs"] == epochs


def test_accumulated_minibatches_are_one_large_one() -> None:
    whole = make_trainer(mini_batch_size=6, ppo_epochs=1)
    parts = make_trainer(mini_batch_size=1, gradient_accumulation_steps=6, ppo_epochs=1)
    expected, found = whole.step(*make_batch()), parts.step(*make_batch())
    assert found["ppo/policy/grad_norm"] == pytest.approx(expected["ppo/policy/grad_norm"], rel=1e-4)
    for name in ("ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_every_update_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every update, not of the first alone, and the statistic is the norm before."""
    norms: list[float] = []

    def optimizer_of(model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def look(*_: Any) -> None:
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

        optimizer.register_step_pre_hook(look)
        return optimizer

    trainer = make_trainer(optimizer_of=optimizer_of, max_grad_norm=0.01)
    for _ in range(2):
        stats = trainer.step(*make_batch())
        assert stats["ppo/policy/grad_norm"] > 0.1
    assert len(norms) == 2 * 12
    assert max(norms) <= 0.01 * (1 + 1e-4)


def test_the_device_cache_is_emptied_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    for wanted in (False, True):
        make_trainer(optimize_device_cache=wanted, ppo_epochs=1).step(*make_batch())
        assert len(emptied) == int(wanted)


def test_early_stopping_leaves_out_epochs() -> None:
    settings = {"learning_rate": 3e-2, "ppo_epochs": 8, "ratio_threshold": 1e9}
    assert make_trainer(**settings).step(*make_batch())["ppo/policy/epochs"] == 8
    stopped = make_trainer(early_stopping=True, target_kl=1e-4, **settings).step(*make_batch())
    assert stopped["ppo/policy/epochs"] < 8
    assert make_trainer(early_stopping=True, target_kl=1e4, **settings).step(*make_batch())["ppo/policy/epochs"] == 8


def test_an_update_beyond_the_ratio_threshold_is_left_out() -> None:
    """At a threshold below 1 every update is too far: weights and moments stay as they are."""
    trainer = make_trainer(ratio_threshold=0.5)
    assert _moved(trainer) == 0.0
    assert not trainer.optimizer.state
    stats = trainer.step(*make_batch())
    assert stats["ppo/policy/skipped_updates"] == 12
    assert make_trainer().step(*make_batch())["ppo/policy/skipped_updates"] == 0


# --- the objective -------------------------------------------------------------------------------------------


def _away_from_reference(family: str = "llama", **settings: Any) -> Any:
    return make_trainer(family, ref_model=tiny_model(family, seed=1), **settings)


def test_the_controllers() -> None:
    adaptive = _away_from_reference(init_kl_coef=0.3, target=0.01, horizon=12)
    fixed = _away_from_reference(init_kl_coef=0.3, adap_kl_ctrl=False)
    kl = adaptive.step(*make_batch())["objective/kl"]
    fixed.step(*make_batch())
    sign = 1 if kl > 0.01 else -1
    assert adaptive.kl_ctl.value == pytest.approx(0.3 * (1 + sign * 0.2 * 6 / 12))
    assert fixed.kl_ctl.value == 0.3
    assert fixed.step(*make_batch())["objective/kl_coef"] == 0.3


def test_the_four_penalties() -> None:
    """What each one adds up to per sequence, from the log-probabilities that the step reports."""
    found = {kind: _away_from_reference(kl_penalty=kind).step(*make_batch()) for kind in ("kl", "abs", "mse", "full")}
    difference = found["kl"]["objective/logprobs"] - found["kl"]["objective/ref_logprobs"]
    assert found["kl"]["objective/kl"] == pytest.approx(difference.sum() / 6, rel=1e-4)
    assert found["abs"]["objective/kl"] == pytest.approx(np.abs(difference).sum() / 6, rel=1e-4)
    assert found["mse"]["objective/kl"] == pytest.approx((difference**2).sum() / 12, rel=1e-4)
    trainer = _away_from_reference(kl_penalty="full")
    queries, responses, _ = make_batch()
    exact = 0.0
    with torch.no_grad():
        for query, response in zip(queries, responses, strict=True):
            ids = torch.cat((query, response))[None]
            mine, theirs = (
                model(ids)[0][0, len(query) - 1 : -1].log_softmax(-1) for model in (trainer.model, _logits(trainer))
            )
            exact += float((mine.exp() * (mine - theirs)).sum())
    assert found["full"]["objective/kl"] == pytest.approx(exact / 6, rel=1e-4)


def _logits(trainer: Any) -> Any:
    return lambda ids: (trainer.ref_model(ids).logits,)


@pytest.mark.parametrize(
    ("field", "value"),
    [("gamma", 0.5), ("lam", 0.5), ("cliprange", 1e-3), ("cliprange_value", 1e-3), ("vf_coef", 1.0)],
)
def test_the_objectives_numbers_matter(field: str, value: float) -> None:
    def weights(**settings: Any) -> torch.Tensor:
        trainer = _away_from_reference(learning_rate=1e-2, **settings)
        trainer.step(*make_batch())
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    assert (weights() - weights(**{field: value})).abs().max() > 1e-5


def test_scores_are_scaled_by_running_moments() -> None:
    queries, responses, scores = make_batch()
    second = [3.0 * score + 1.0 for score in scores]
    seen = torch.stack(scores + second)
    for norm in (False, True):
        trainer = make_trainer(use_score_scaling=True, use_score_norm=norm, ppo_epochs=1)
        trainer.step(queries, responses, scores)
        stats = trainer.step(queries, responses, second)
        expected = (torch.stack(second) - (seen.mean() if norm else 0.0)) / seen.std()
        assert stats["ppo/mean_scores"] == pytest.approx(expected.mean().item(), rel=1e-4)
        assert stats["ppo/std_scores"] == pytest.approx(expected.std().item(), rel=1e-4)


@pytest.mark.parametrize("norm", [False, True])
def test_a_first_batch_of_one_has_defined_scores(norm: bool) -> None:
    trainer = make_trainer(batch_size=1, mini_batch_size=1, use_score_scaling=True, use_score_norm=norm)
    for _ in range(2):
        stats = trainer.step(*make_batch(1))
        assert all(np.isfinite(value).all() for value in stats.values())


def test_running_moments_come_with_the_trainers_state() -> None:
    one, other = (make_trainer(use_score_scaling=True, ppo_epochs=1) for _ in range(2))
    one.step(*make_batch())
    other.load_state_dict(one.state_dict())
    assert other.scores.state == one.scores.state
    assert one.scores.state.count == 6


def test_scores_are_clipped() -> None:
    queries, responses, _ = make_batch()
    scores = [torch.tensor(value) for value in (-9.0, -0.1, 0.0, 0.1, 0.2, 9.0)]
    stats = make_trainer(score_clip=0.5).step(queries, responses, scores)
    clipped = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.2, 0.5])
    assert stats["ppo/mean_scores"] == pytest.approx(clipped.mean().item(), abs=1e-6)
    assert stats["ppo/std_scores"] == pytest.approx(clipped.std().item(), abs=1e-6)


def test_rewards_are_whitened() -> None:
    """With gamma = lam = 0 an advantage is its reward minus the value, so that the returns are the rewards."""
    settings = {"gamma": 0.0, "lam": 0.0}
    plain = _away_from_reference(**settings).step(*make_batch())
    white = _away_from_reference(whiten_rewards=True, **settings).step(*make_batch())
    assert plain["ppo/returns/var"] != pytest.approx(1.0, abs=0.01)
    assert white["ppo/returns/var"] == pytest.approx(1.0, abs=1e-3)
    assert white["ppo/returns/mean"] == pytest.approx(plain["ppo/returns/mean"], abs=1e-4), "the mean stays"


# --- static padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_static_padding_changes_shapes_and_nothing_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[tuple[int, ...]] = set()
    if family == "t5":
        name, static = "seq2seq_hidden_states", {"pad_max_len": 12, "pad_max_input_len": 9}
    else:
        name, static = "hidden_states", {"pad_max_len": 20}
    trunk = getattr(forward_module, name)

    def recording(model: Any, *tensors: Any) -> Any:
        shapes.add(tuple(size for tensor in tensors for size in tensor.shape))
        return trunk(model, *tensors)

    monkeypatch.setattr(forward_module, name, recording)
    trainers = [_away_from_reference(family), _away_from_reference(family, pad_for_acceleration=True, **static)]
    found = []
    for trainer in trainers:
        shapes.clear()
        found.append([trainer.step(*make_batch(seed=seed)) for seed in range(2)])
    # One shape to score the batch, one for the minibatches.
    assert len(shapes) == 2
    widths = {shape[1:] for shape in shapes}
    assert widths == (
        {(9, 6, 9, 6, 12), (9, 2, 9, 2, 12)} if family == "t5" else {(20, 6, 20, 6, 20), (20, 2, 20, 2, 20)}
    )
    for ragged, padded in zip(*found, strict=True):
        for key in ("objective/kl", "ppo/loss/total", "ppo/policy/entropy", "ppo/val/vpred", "ppo/policy/grad_norm"):
            assert padded[key] == pytest.approx(ragged[key], abs=2e-3), key
        np.testing.assert_allclose(padded["objective/logprobs"], ragged["objective/logprobs"], atol=2e-3)
    for name, parameter in trainers[0].model.named_parameters():
        torch.testing.assert_close(dict(trainers[1].model.named_parameters())[name], parameter, atol=3e-3, rtol=0)


def test_static_padding_of_prompts_in_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    plain = make_trainer().generate(queries, return_prompt=False, max_new_tokens=4, do_sample=False)
    trainer = make_trainer(pad_for_acceleration=True, pad_max_len=20, pad_max_input_len=9)
    widths: list[int] = []
    generate = trainer.model.generate

    def recording(**kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return generate(**kwargs)

    monkeypatch.setattr(trainer.model, "generate", recording)
    padded = trainer.generate(queries, return_prompt=False, batch_size=1, max_new_tokens=4, do_sample=False)
    assert widths == [9, 9]
    assert [row.tolist() for row in padded] == [row.tolist() for row in plain]
    whole = trainer.generate(queries, max_new_tokens=4, do_sample=False)
    assert whole[0][:3].tolist() == [5, 6, 7]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_row_longer_than_the_static_width_is_refused_by_the_settings_name(family: str) -> None:
    """TRL pads by a negative amount there, which crops tokens."""
    trainer = make_trainer(family, pad_for_acceleration=True, pad_max_len=5, pad_max_input_len=4)
    queries, responses, scores = make_batch()
    queries = [query[:4] for query in queries]
    with pytest.raises(ValueError, match=r"row \d: .* tokens, but pad_max_len is 5; raise pad_max_len"):
        trainer.step(queries, responses, scores)
    with pytest.raises(ValueError, match=r"row 1: the prompt is 6 tokens, but pad_max_input_len is 4"):
        trainer.generate([torch.tensor([5]), torch.full((6,), 5)], max_new_tokens=2)
    assert trainer.current_step == 0


def test_an_encoder_decoder_needs_both_widths() -> None:
    with pytest.raises(ValueError, match="pad_max_input_len is 0, expected the longest prompt"):
        make_trainer("t5", pad_for_acceleration=True, pad_max_len=9)
