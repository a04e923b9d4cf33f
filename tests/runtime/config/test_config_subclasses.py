"""Subclasses of PPOConfig with fields of their own, as old scripts make them, are checked and can train."""

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import warnings
from abc import ABC
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from transformers import HfArgumentParser

from ppo_runtime import PPOConfig, PPOTrainer
from ppo_runtime.common.redact import plain_settings
from tests.runtime.support.tiny import tiny_tokenizer
from tests.runtime.support.trainers import SETTINGS, make_batch, make_trainer


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


@dataclasses.dataclass(slots=True)
class DataclassWithSlots(PPOConfig):
    own: int = 3


@dataclasses.dataclass
class DataclassThatCallsUp(PPOConfig):
    own: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own = self.batch_size // self.batch_size + 2


@dataclasses.dataclass
class Child(Dataclass):
    other: dict[str, int] = dataclasses.field(default_factory=dict)


@attrs.define
class AttrsChild(Attrs):
    """The second attrs class in a row, which attrs would give a plain object's assignment."""


@attrs.define
class AttrsThatFinishes(PPOConfig):
    own: int = 0

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.own = self.own + 3


class Mixin:
    own: int = 3


class WithMixin(Mixin, PPOConfig):
    pass


class AbstractMixin(ABC):  # noqa: B024  a metaclass is what it is here for
    own: int | None = 3


class WithAbstractMixin(PPOConfig, AbstractMixin):
    pass


@dataclasses.dataclass
class DataclassMixin:
    own: int = 3


@dataclasses.dataclass
class WithDataclassMixin(DataclassMixin, PPOConfig):
    pass


class WithProperty(PPOConfig):
    @property
    def own(self) -> int:
        return self.compare_steps + 2

    @own.setter
    def own(self, value: int) -> None:
        self.compare_steps = value - 2


class SetsBefore(PPOConfig):
    def __init__(self, own: int = 3, **settings: Any) -> None:
        self.own = own
        super().__init__(**settings)


@dataclasses.dataclass
class SetsNoField(PPOConfig):
    def __post_init__(self) -> None:
        self.own = 3


KINDS = [
    Dataclass,
    DataclassThatFinishes,
    DataclassThatCallsUp,
    DataclassWithSlots,
    Child,
    Attrs,
    AttrsWithDict,
    AttrsChild,
    AttrsThatFinishes,
    Annotated,
    HandWritten,
    SetsBefore,
    SetsNoField,
    WithMixin,
    WithAbstractMixin,
    WithDataclassMixin,
    WithProperty,
]
WITH_A_FIELD = [Dataclass, DataclassWithSlots, Child, Attrs, AttrsWithDict, AttrsChild, WithDataclassMixin]
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
    with pytest.raises(AttributeError, match=rf"{kind.__name__} has no setting 'owns'"):
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


@pytest.mark.parametrize("kind", WITH_A_FIELD)
def test_its_field_is_among_the_others(kind: Any) -> None:
    """For attrs and for dataclasses, whichever of the two has made it."""
    more = {"other": {}} if kind is Child else {}
    config = kind(own=4)
    assert config.to_dict() == PPOConfig().to_dict() | {"own": 4} | more
    assert plain_settings(config) == attrs.asdict(config) == dataclasses.asdict(config) == config.to_dict()
    for changed in (attrs.evolve(config, batch_size=8), dataclasses.replace(config, batch_size=8)):
        assert (type(changed), changed.own, changed.batch_size) == (kind, 4, 8)
    assert "own" in inspect.signature(kind).parameters
    with pytest.raises(TypeError, match=f"{kind.__name__} has no setting 'owns'; did you mean own"):
        kind(owns=4)


def test_a_dataclass_comes_from_a_command_line() -> None:
    (config,) = HfArgumentParser(Dataclass).parse_args_into_dataclasses(["--own", "4", "--batch_size", "9"])
    assert (config.own, config.batch_size) == (4, 9)


@kinds
def test_it_shows_no_token(kind: Any) -> None:
    with warnings.catch_warnings():
        config = kind(tracker_kwargs={"token": "horse-battery"})
    assert "horse-battery" not in repr(config)


def test_a_pickle_is_checked_where_nothing_has_been_made_yet(tmp_path: Path) -> None:
    """In another process, as a worker's: there no constructor has run. All in one, since it takes seconds to start."""
    # Children first: what is done for a parent is done for them.
    configs = [kind(batch_size=8).in_use() for kind in sorted(KINDS, key=lambda kind: -len(kind.__mro__))]
    (tmp_path / "configs").write_bytes(b"".join(map(pickle.dumps, configs)))
    script = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    for _ in range(int(sys.argv[2])):
        config = pickle.load(file)
        for name, value in {"batch_size": 0, "mini_batch_size": 3, "batchsize": 3}.items():
            try:
                setattr(config, name, value)
            except (ValueError, AttributeError) as error:
                assert name in str(error), error
            else:
                raise SystemExit(f"{type(config).__name__}: {name} was assigned {value}")
        config.own = 4
        config.batch_size = 16
        assert config.in_use().own == 4, type(config)
        assert (config.own, config.batch_size, type(config)(batch_size=2).batch_size) == (4, 16, 2)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "configs"), str(len(configs))]
    subprocess.run(command, check=True, timeout=240)


@pytest.mark.parametrize("slots", [False, True])
def test_converters_and_validators_of_its_own_run_once_a_value(slots: bool) -> None:
    seen: list[int] = []

    def doubled(value: int) -> int:
        seen.append(value)
        return 2 * value

    @attrs.define(slots=slots)
    class Doubling(PPOConfig):
        own: int = attrs.field(default=3, converter=doubled, validator=attrs.validators.lt(100))

    config: Any = Doubling(own=4)
    config.gamma = 0.5
    assert (config.own, config.in_use().own, copy.deepcopy(config).own, seen) == (8, 8, 8, [4])
    config.own = 5
    assert (config.own, seen) == (10, [4, 5])
    with pytest.raises(ValueError, match="own"):
        config.own = 50
    assert config.own == 10

    @attrs.define(slots=slots)
    class Child(Doubling):
        """Attrs gives back a plain object's assignment to whom it takes for having inherited its own."""

    child: Any = Child()
    with pytest.raises(ValueError, match="batch_size is 0"):
        child.batch_size = 0


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("hooks", [None, attrs.setters.NO_OP])
def test_a_subclass_of_one_that_attrs_made_is_checked(hooks: Any, slots: bool) -> None:
    """One without hooks of its own gets a plain object's assignment where attrs takes the parent's for its own."""

    @attrs.define(slots=slots)
    class Parent(PPOConfig):
        own: int = 3

    @attrs.define(slots=slots, on_setattr=hooks)
    class Child(Parent):
        more: int = 1

    child: Any = Child()
    with pytest.raises(ValueError, match="batch_size is 0"):
        child.batch_size = 0
    with pytest.raises(ValueError, match="learning_rate was read when the trainer was made"):
        child.in_use().learning_rate = 1.0


@pytest.mark.parametrize("decorator", [dataclasses.dataclass, attrs.define])
def test_a_default_of_its_own_is_as_checked(decorator: Any) -> None:
    @decorator
    class Larger(PPOConfig):
        batch_size: int = 32
        steps: int = np.int64(64)  # as a script computes it

    assert (Larger().batch_size, type(Larger().steps)) == (32, int)
    with pytest.raises(ValueError, match="batch_size is -1, expected an integer of at least 1"):
        Larger(batch_size=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Larger().batch_size = 0


@pytest.mark.parametrize("kind", [Dataclass, DataclassThatCallsUp])
def test_what_a_constructor_reads_behind_the_call_up_is_checked(kind: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is 0, expected an integer of at least 1"):
        kind(batch_size=0)


@pytest.mark.parametrize("decorator", [dataclasses.dataclass, attrs.define, lambda cls: cls])
def test_a_former_name_may_be_a_setting_of_its_own(decorator: Any) -> None:
    class Plain(PPOConfig):
        gradient_checkpointing: bool = False

        def __init__(self, gradient_checkpointing: bool = False, **settings: Any) -> None:
            super().__init__(**settings)
            self.gradient_checkpointing = gradient_checkpointing

    if decorator in (dataclasses.dataclass, attrs.define):
        del Plain.__init__
    config: Any = decorator(Plain)(gradient_checkpointing=True)
    assert config.gradient_checkpointing is True
    config.gradient_checkpointing = False
    assert config.gradient_checkpointing is False
    assert config.in_use().gradient_checkpointing is False


def test_what_cannot_be_assigned_is_refused() -> None:
    config: Any = HandWritten()
    for name in ("to_dict", "logging_dir", "in_use"):
        with pytest.raises(AttributeError, match=f"HandWritten has no setting '{name}'"):
            setattr(config, name, 3)


def test_a_constructor_that_does_not_call_ours_is_told_to() -> None:
    class Forgetful(PPOConfig):
        def __init__(self, own: int = 3) -> None:
            self.own = own

    with pytest.raises(
        TypeError, match=r"Forgetful was made without exp_name, .*; call super\(\).__init__\(\*\*settings\)"
    ):
        Forgetful()


def test_attrs_and_dataclasses_on_top_of_each_other_are_refused() -> None:
    """Where one would not see, or not convert, what the other has."""

    @dataclasses.dataclass
    class NeverMade(PPOConfig):
        own: int = 3

    with pytest.raises(TypeError, match=r"Mixed is made by attrs and inherits own from a dataclass.*@dataclasses"):

        @attrs.define
        class Mixed(NeverMade):
            pass

    @attrs.define
    class Doubling(PPOConfig):
        own: int = attrs.field(default=3, converter=int)

    @dataclasses.dataclass
    class OnTop(Doubling):
        pass

    with pytest.raises(TypeError, match=r"OnTop is a dataclass and inherits own with a converter.*@attrs\.define"):
        OnTop()


def test_what_it_adds_is_not_published(tmp_path: Path) -> None:
    config = Dataclass(**SETTINGS, own=12345)
    trainer = PPOTrainer(config, make_trainer().model, None, tiny_tokenizer())
    trainer.save_pretrained(tmp_path)
    assert "12345" not in (tmp_path / "README.md").read_text()
