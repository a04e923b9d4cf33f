"""Subclasses of PPOConfig with fields of their own, as old scripts make them, are checked and can train."""

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import attrs
import pytest
from transformers import HfArgumentParser

from ppo_runtime import PPOConfig, PPOTrainer
from tests.runtime.tiny import tiny_tokenizer
from tests.runtime.trainers import SETTINGS, make_batch, make_trainer


@dataclasses.dataclass
class Dataclass(PPOConfig):
    own: int = 3


@dataclasses.dataclass
class DataclassThatFinishes(PPOConfig):
    own: int = 0

    def __post_init__(self) -> None:
        self.own = self.own + 3


@attrs.define
class Attrs(PPOConfig):
    own: int = 3


@attrs.define(slots=False)
class AttrsWithDict(PPOConfig):
    own: int = 3


class Annotated(PPOConfig):
    own: int = 3


class HandWritten(PPOConfig):
    own: int

    def __init__(self, own: int = 3, **settings: Any) -> None:
        super().__init__(**settings)
        self.own = own


KINDS = [Dataclass, DataclassThatFinishes, Attrs, AttrsWithDict, Annotated, HandWritten]
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_its_settings_are_checked(kind: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is -1, expected an integer of at least 1"):
        kind(batch_size=-1)
    with pytest.raises(ValueError, match="expected a multiple"):
        kind(batch_size=8, mini_batch_size=3)
    with pytest.raises(ValueError, match="tracker_kwargs is a int"):
        kind(tracker_kwargs=3)
    config = kind(**SETTINGS)
    with pytest.raises(ValueError, match="batch_size is 0"):
        config.batch_size = 0
    with pytest.raises(AttributeError, match=rf"{kind.__name__} has no setting 'owns'; did you mean own"):
        config.owns = 3
    assert config.own == 3
    config.own = 5
    assert config.own == 5


@kinds
def test_it_can_train(kind: Any) -> None:
    given = kind(**SETTINGS)
    trainer: Any = PPOTrainer(given, make_trainer().model, None, tiny_tokenizer())
    assert type(trainer.config) is kind
    assert trainer.config.own == 3
    trainer.step(*make_batch())
    with pytest.raises(ValueError, match="seed was read when the trainer was made"):
        trainer.config.seed = 4
    trainer.config.gamma = 0.5
    assert (trainer.config.gamma, trainer.config.own, given.gamma) == (0.5, 3, 1.0)


@kinds
def test_it_takes_former_names(kind: Any) -> None:
    with pytest.warns(UserWarning, match="forward_batch_size is now mini_batch_size") as seen:
        config = kind(batch_size=8, forward_batch_size=4)
    assert config.mini_batch_size == 4
    assert len(seen) == 1


@kinds
def test_a_copy_is_of_its_kind_and_free(kind: Any) -> None:
    config = kind(**SETTINGS).in_use()
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is kind
        assert (other.own, other.batch_size) == (3, config.batch_size)
        other.seed = 5
        with pytest.raises(ValueError, match="gamma is 2"):
            other.gamma = 2
    assert config.seed == 0


@pytest.mark.parametrize("kind", [Dataclass, Attrs, AttrsWithDict])
def test_its_field_is_among_the_others(kind: Any) -> None:
    assert kind(own=4).to_dict() == PPOConfig().to_dict() | {"own": 4}
    with pytest.raises(TypeError, match=f"{kind.__name__} has no setting 'owns'; did you mean own"):
        kind(owns=4)


def test_a_dataclass_comes_from_a_command_line() -> None:
    (config,) = HfArgumentParser(Dataclass).parse_args_into_dataclasses(["--own", "4", "--batch_size", "9"])  # pyright: ignore[reportArgumentType]  # its annotation knows no class but its own protocol's
    assert (config.own, config.batch_size) == (4, 9)


@kinds
def test_it_shows_no_token(kind: Any) -> None:
    with warnings.catch_warnings():
        config = kind(tracker_kwargs={"token": "horse-battery"})
    assert "horse-battery" not in repr(config)
