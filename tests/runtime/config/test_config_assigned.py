"""PPOConfig assigned to, read by tools for dataclasses, and given in the words of earlier releases of TRL."""

import copy
import dataclasses
import json
import logging
import pickle
import warnings
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from transformers import HfArgumentParser

from ppo_runtime import AdaptiveKLController, FixedKLController, PPOConfig
from ppo_runtime.config import FIXED
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer, untimed

# For every field a value that is legal beside tests.runtime.support.trainers.SETTINGS, and is not the default.
OTHER: dict[str, Any] = {
    "exp_name": "other",
    "seed": 3,
    "log_with": "tensorboard",
    "task_name": "task",
    "model_name": "name",
    "query_dataset": "rows",
    "reward_model": "judge",
    "remove_unused_columns": False,
    "drop_last": False,
    "tracker_kwargs": {"a": 1},
    "project_kwargs": {"logging_dir": "there"},
    "tracker_project_name": "project",
    "push_to_hub_if_best_kwargs": {"repo_id": "a/b"},
    "compare_steps": 2,
    "accel": "auto",
    "accel_strict": True,
    "device": "cpu",
    "ranks_timeout": 60.0,
    "parallelism": "fsdp2",
    "steps": 12,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "mini_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "ppo_epochs": 2,
    "max_grad_norm": 0.01,
    "optimize_device_cache": True,
    "early_stopping": True,
    "target_kl": 0.5,
    "ratio_threshold": 0.5,
    "on_nonfinite": "stop",
    "adap_kl_ctrl": False,
    "init_kl_coef": 0.5,
    "kl_penalty": "abs",
    "target": 3.0,
    "horizon": 500.0,
    "gamma": 0.5,
    "lam": 0.5,
    "cliprange": 0.01,
    "cliprange_value": 0.01,
    "vf_coef": 1.0,
    "use_score_scaling": True,
    "use_score_norm": False,
    "score_clip": 0.1,
    "whiten_rewards": True,
    "pad_for_acceleration": False,
    "pad_max_len": 20,
    "pad_max_input_len": 9,
    "is_encoder_decoder": True,
    "is_peft_model": True,
}
REFUSED_ALWAYS = {"accelerator_kwargs", "use_habana"}
NAMES = [field.name for field in attrs.fields(PPOConfig) if field.name in OTHER]


def test_every_field_is_tried() -> None:
    missing = {field.name for field in attrs.fields(PPOConfig)} - set(OTHER) - REFUSED_ALWAYS
    assert not missing, "give OTHER a value for it"


@pytest.mark.parametrize("name", NAMES)
def test_a_field_can_be_assigned(name: str) -> None:
    config = PPOConfig(**SETTINGS)
    setattr(config, name, OTHER[name])
    assert config == PPOConfig(**(SETTINGS | {name: OTHER[name]}))


@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_to_a_trainers_settings_is_in_force_or_refused(name: str) -> None:
    """After the assignment a step is that of a trainer made so; what was built already names where to change it."""

    def trainer(**settings: Any) -> Any:
        settings = {"accel": "eager", "gamma": 0.9, **settings}
        return make_trainer(ref_model=tiny_model("llama", seed=1), **settings)

    if name in FIXED:
        found = trainer()
        before = getattr(found.config, name)
        with pytest.raises(ValueError, match=rf"{name} was read when the trainer was made, .* would do nothing: "):
            setattr(found.config, name, OTHER[name])
        assert getattr(found.config, name) == before
        return
    size = OTHER["batch_size"] if name == "batch_size" else SETTINGS["batch_size"]
    runs = []
    for assigned in (False, True):
        found = trainer() if assigned else trainer(**{name: OTHER[name]})
        found.push_to_hub = lambda **_: None
        if assigned:
            setattr(found.config, name, OTHER[name])
        runs.append([untimed(found.step(*make_batch(size, seed=seed))) for seed in range(2)])
    for expected, stats in zip(*runs, strict=True):
        for key, value in expected.items():
            np.testing.assert_array_equal(stats[key], value, err_msg=key)


def test_a_trainers_settings_are_its_own() -> None:
    """What is assigned to the configuration afterwards is for the next trainer, and the other way round."""
    trainer = make_trainer()
    given = PPOConfig(**SETTINGS)
    assert given.is_peft_model is None
    trainer.config.mini_batch_size = 1
    given.learning_rate = 0.5
    assert given.mini_batch_size == 2
    assert trainer.config.learning_rate == SETTINGS["learning_rate"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("mini_batch_size", 4),
        ("gamma", 2.0),
        ("kl_penalty", "k1"),
        ("early_stopping", 1),
        ("accelerator_kwargs", {"cpu": True}),
        ("project_kwargs", {"total_limit": 1}),
        ("horizon", 1.0),
        ("tracker_kwargs", "["),
        ("use_habana", True),
        ("is_peft_model", True),
        ("learning_rate", -1.0),
    ],
)
@pytest.mark.parametrize("in_use", [False, True])
def test_a_refused_assignment_leaves_the_old_value(name: str, value: Any, in_use: bool) -> None:
    config = make_trainer().config if in_use else PPOConfig(**SETTINGS)
    if name == "is_peft_model" and not in_use:
        return
    before = copy.deepcopy(vars(config))
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
    assert vars(config) == before


def test_a_misspelt_name_is_refused() -> None:
    config = PPOConfig()
    with pytest.raises(AttributeError, match="PPOConfig has no setting 'mini_batchsize'; did you mean mini_batch_size"):
        config.mini_batchsize = 3
    with pytest.raises(TypeError, match="PPOConfig has no setting 'mini_batchsize'; did you mean mini_batch_size"):
        PPOConfig(mini_batchsize=3)


def test_copies_are_equal_and_can_be_assigned() -> None:
    config = PPOConfig(tracker_kwargs={"a": {"b": 1}})
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), attrs.evolve(config)):
        assert other == config
        other.seed = 5
        assert config.seed == 0
    with pytest.raises(ValueError, match="tracker_kwargs was read") as refusal:
        make_trainer().config.tracker_kwargs = {"wandb": {"token": "hf_secretsecretsecret"}}
    assert "secretsecret" not in str(refusal.value)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), attrs.evolve])
def test_a_copy_of_a_trainers_settings_is_nobodys(copied: Any) -> None:
    config = make_trainer().config
    other = copied(config)
    assert other == config
    other.seed = 5
    assert config.seed == 0
    with pytest.raises(ValueError, match="seed was read"):
        config.seed = 5
    with pytest.raises(ValueError, match="gamma is 2"):
        other.gamma = 2.0


# --- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.int64, np.int32, np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_become_pythons(number: Any) -> None:
    config = PPOConfig(batch_size=number(8), seed=number(3), learning_rate=np.float32(0.5), early_stopping=np.True_)
    config.mini_batch_size = number(4)
    config.gamma = np.float64(0.5)
    found = (config.batch_size, config.seed, config.learning_rate, config.early_stopping, config.mini_batch_size)
    assert found == (8, 3, 0.5, True, 4)
    assert [type(x) for x in (*found, config.gamma)] == [int, int, float, bool, int, float]
    with pytest.raises(ValueError, match=r"batch_size is 1\.5, expected an integer"):
        PPOConfig(batch_size=np.float32(1.5))


# --- tools for dataclasses -----------------------------------------------------------------------------------


def test_dataclasses_know_it() -> None:
    config = PPOConfig(batch_size=8, tracker_kwargs={"a": 1})
    assert dataclasses.is_dataclass(PPOConfig)
    assert [field.name for field in dataclasses.fields(config)] == [field.name for field in attrs.fields(PPOConfig)]
    assert dataclasses.asdict(config) == config.to_dict() == vars(config)
    assert dataclasses.replace(config, mini_batch_size=2) == attrs.evolve(config, mini_batch_size=2)
    with pytest.raises(ValueError, match="mini_batch_size is 0"):
        dataclasses.replace(config, mini_batch_size=0)
    assert PPOConfig(**dataclasses.asdict(config)) == config
    assert attrs.has(PPOConfig)


@dataclasses.dataclass
class ScriptArguments:
    use_peft: bool = False


def parse(*arguments: str) -> PPOConfig:
    _, config = HfArgumentParser((ScriptArguments, PPOConfig)).parse_args_into_dataclasses(list(arguments))
    return config


def test_a_command_line_without_settings_is_the_default() -> None:
    assert parse("--use_peft") == PPOConfig()


@pytest.mark.parametrize("name", [*NAMES, *sorted(REFUSED_ALWAYS)])
def test_every_field_comes_from_a_command_line(name: str) -> None:
    if name == "accelerator_kwargs":
        assert parse("--accelerator_kwargs", "{}") == PPOConfig()
        return
    value = OTHER.get(name, False)
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    config = parse("--batch_size", "9", f"--{name}", text)
    assert config == PPOConfig(**({"batch_size": 9} | {name: value}))
    assert type(getattr(config, name)) is type(getattr(PPOConfig(), name)) or getattr(PPOConfig(), name) is None


def test_what_is_no_json_is_refused_by_the_options_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--tracker_kwargs", "[1]")
    assert "tracker_kwargs" in capsys.readouterr().err
    for value in (3, "[1]", "{", '["ab"]', '[["a", 1]]'):
        with pytest.raises(ValueError, match=r"tracker_kwargs is a (int|str), expected a dictionary, or JSON for one"):
            PPOConfig(tracker_kwargs=value)
    assert PPOConfig(tracker_kwargs=None).tracker_kwargs == {}


# --- former names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "holds", "says"),
    [
        ({"optimize_cuda_cache": True}, {"optimize_device_cache": True}, "is now optimize_device_cache"),
        ({"optimize_cuda_cache": False}, {}, "is now optimize_device_cache, which is set to False"),
        ({"forward_batch_size": 2}, {"mini_batch_size": 2}, "is now mini_batch_size, which is set to 2"),
        ({"optimize_device_cache": None}, {}, "optimize_device_cache is None, which is taken for False"),
        ({"dataset_num_proc": 4}, {}, "give num_proc to the map of your dataset"),
        ({"gradient_checkpointing": True}, {}, "model.gradient_checkpointing_enable"),
        ({"world_size": 2}, {}, "processes that torchrun has started"),
        ({"global_batch_size": 256}, {}, "follows from batch_size"),
        ({"use_score_norm": True}, {"use_score_norm": True}, "scores are then left as they are"),
    ],
)
@pytest.mark.parametrize("assigned", [False, True])
def test_former_names_say_what_holds_now(given: Any, holds: Any, says: str, assigned: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = PPOConfig(batch_size=8, **holds)
    config = PPOConfig(batch_size=8)
    with pytest.warns(UserWarning, match=says) as seen:  # noqa: PT031  # one of two statements
        if assigned:
            setattr(config, *next(iter(given.items())))
        else:
            config = PPOConfig(batch_size=8, **given)
    assert len(seen) == 1
    assert seen[0].filename == __file__, "the warning points at the user's line"
    assert config == expected


@pytest.mark.parametrize("name", ["optimize_cuda_cache", "forward_batch_size", "world_size", "dataset_num_proc"])
def test_a_former_name_that_asks_for_nothing_goes_silently(name: str) -> None:
    assert PPOConfig(**{name: None}) == PPOConfig()


@pytest.mark.parametrize("name", ["forward_batch_size", "optimize_cuda_cache"])
def test_a_setting_by_both_its_names_is_one_value(name: str) -> None:
    now, first, second = ("mini_batch_size", 4, 8) if "batch" in name else ("optimize_device_cache", False, True)
    with pytest.raises(ValueError, match=rf"{name} is {second} and {now} is {first}, expected one of them alone"):
        PPOConfig(batch_size=8, **{now: first, name: second})
    with pytest.warns(UserWarning, match=name):
        assert getattr(PPOConfig(batch_size=8, **{now: second, name: second}), now) == second


def test_norm_alone_leaves_scores_as_they_are() -> None:
    with pytest.warns(UserWarning, match="use_score_scaling"):
        alone = make_trainer(use_score_norm=True)
    plain = make_trainer()
    assert alone.step(*make_batch())["ppo/mean_scores"] == plain.step(*make_batch())["ppo/mean_scores"]


# --- what a default costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 256, "mini_batch_size": 1}, True),
        ({"batch_size": 256, "mini_batch_size": 1, "gradient_accumulation_steps": 8}, False),
        ({"batch_size": 256, "mini_batch_size": 8}, False),
        ({"batch_size": 8, "mini_batch_size": 1}, False),
    ],
)
def test_many_updates_of_one_sequence_are_pointed_out(
    settings: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make_trainer(**settings)
    found = [record.getMessage() for record in caplog.records if "mini_batch_size" in record.getMessage()]
    assert len(found) == said
    assert all("1024 optimiser updates" in message for message in found)


# --- the controllers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: FixedKLController(0.2), lambda: AdaptiveKLController(0.2, 6.0, 100.0)])
def test_a_controllers_value_can_be_set(make: Any) -> None:
    controller = make()
    controller.value = np.float32(0.5)
    assert controller.value == 0.5
    assert controller.state.coef == 0.5
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"value is .*, expected a finite number of at least 0"):
            controller.value = bad
    assert controller.value == 0.5
    trainer = make_trainer(init_kl_coef=0.1)
    trainer.kl_ctl.value = 0.5
    assert trainer.step(*make_batch())["objective/kl_coef"] == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, "0.2", None, True, 10**400])
def test_a_controller_is_made_of_numbers(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"kl_coef is .*, expected a finite number of at least 0"):
        FixedKLController(bad)
    good = {"init_kl_coef": 0.2, "target": 6.0, "horizon": 100.0}
    for name in good:
        with pytest.raises(ValueError, match=f"{name} is .*, expected a finite number"):
            AdaptiveKLController(**(good | {name: bad}))
    controller = AdaptiveKLController(**good)
    for name in ("target", "horizon"):
        with pytest.raises(ValueError, match=f"{name} is .*, expected a finite number above 0"):
            setattr(controller, name, bad)
    assert (controller.target, controller.horizon) == (6.0, 100.0)


@pytest.mark.parametrize("current", [6.5, np.float32(6.5), torch.tensor(6.5)])
def test_a_coefficient_stays_a_number(current: Any) -> None:
    """Within 20 % of the target nothing is clipped, and a tensor would go through."""
    controller = AdaptiveKLController(0.2, 6.0, 10_000)
    controller.update(current, 6)
    assert type(controller.value) is float
