"""PPOConfig: TRL's defaults, derived sizes, and refusals that name the field."""

import numpy as np
import pytest
import torch.distributed as dist

from ppo_runtime.config import PPOConfig


def test_defaults_are_those_of_trl() -> None:
    config = PPOConfig()
    assert (config.learning_rate, config.batch_size, config.mini_batch_size, config.ppo_epochs) == (1e-5, 256, 1, 4)
    assert (config.init_kl_coef, config.target, config.horizon, config.kl_penalty) == (0.2, 6.0, 10000.0, "kl")
    assert (config.gamma, config.lam, config.cliprange, config.cliprange_value, config.vf_coef) == (
        1.0,
        0.95,
        0.2,
        0.2,
        0.1,
    )
    assert (config.steps, config.seed, config.ratio_threshold, config.max_grad_norm) == (20000, 0, 10.0, None)
    assert config.drop_last


def test_derived_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = PPOConfig(batch_size=32, mini_batch_size=4, gradient_accumulation_steps=2, steps=100)
    assert config.backward_batch_size == 8
    assert config.global_backward_batch_size == 24
    assert config.global_batch_size == 96
    assert config.total_ppo_epochs == 4  # 100 / 32, rounded up


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("mini_batch_size", -1),
        ("ppo_epochs", 1.5),
        ("steps", True),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("cliprange", 0),
        ("max_grad_norm", 0.0),
        ("score_clip", -1.0),
        ("target", 0),
        ("kl_penalty", "k1"),
        ("log_with", "mlflow"),
        ("accel", "cuda"),
        ("early_stopping", 1),
        ("use_habana", True),
        ("accelerator_kwargs", {"cpu": True}),
        ("learning_rate", 10**400),
        ("steps", 10**400),
        ("batch_size", 2**63),
        ("seed", 10**400),
        ("project_kwargs", {3: 1, "a": 2}),
        ("push_to_hub_if_best_kwargs", {3: 1, "a": 2}),
        ("tracker_kwargs", {3: 1, "a": 2}),
        ("tracker_kwargs", ["ab"]),
        ("tracker_kwargs", [("a", 1)]),
        ("tracker_kwargs", {"ab"}),
        ("log_with", np.array(["wandb", "tensorboard"])),
        ("accel", np.array(["auto", "eager"])),
        ("task_name", 3),
        ("model_name", ["gpt2"]),
        ("is_peft_model", "no"),
        ("is_encoder_decoder", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as refusal:
        PPOConfig(**{field: value})
    assert "{" not in str(refusal.value).replace(repr(value), ""), "a message with an unfilled placeholder"


@pytest.mark.parametrize("given", ["two", "0", "-1", "1.5"])
def test_a_world_size_that_is_none_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(ValueError, match=f"WORLD_SIZE is '{given}' in the environment, expected the number"):
        PPOConfig()
    monkeypatch.setenv("WORLD_SIZE", "")
    assert PPOConfig().world_size == 1


def test_the_world_is_that_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a launcher has left in the environment."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert PPOConfig().world_size == 3
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert PPOConfig(batch_size=8).global_batch_size == 8
    finally:
        dist.destroy_process_group()


def test_batch_size_must_be_a_multiple_of_the_backward_batch() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 10, expected a multiple of .* = 8"):
        PPOConfig(batch_size=10, mini_batch_size=4, gradient_accumulation_steps=2)


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon"):
        PPOConfig(batch_size=256, horizon=51)
    PPOConfig(batch_size=256, horizon=51, adap_kl_ctrl=False)
