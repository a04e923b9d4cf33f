"""The trainer's settings, and the only place of their defaults."""

import difflib
import functools
import inspect
import math
import os
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import attrs

from ppo_runtime.common import former_settings
from ppo_runtime.common.dataclass_view import JSONDict, with_attrs_fields, with_dataclass_fields
from ppo_runtime.common.redact import without_secrets

KLPenalty = Literal["kl", "abs", "mse", "full"]
TrackerName = Literal["tensorboard", "wandb"]
ACCELERATORS = ("auto", "eager", "ipex")

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]
if TYPE_CHECKING:
    Options = dict[str, Any]
else:  # what a command line's text is turned into
    Options = JSONDict
ValueT = TypeVar("ValueT")
ConfigT = TypeVar("ConfigT", bound="type[PPOConfig]")

LARGE_BATCH = 32
"""From here on a minibatch of one sequence is more likely an oversight than a wish."""
LARGEST = 2**63
"""Whole numbers are below it: torch holds no larger ones, and a float none of hundreds of digits."""
_OF_THE_RUN = "name the run before its trainer is made"
FIXED = {
    "exp_name": _OF_THE_RUN,
    "log_with": _OF_THE_RUN,
    "tracker_kwargs": _OF_THE_RUN,
    "tracker_project_name": _OF_THE_RUN,
    "project_kwargs": _OF_THE_RUN,
    "seed": "call ppo_runtime.set_seed",
    "accel": "choose before the trainer is made: its reference has been prepared",
    "accel_strict": "choose before the trainer is made: its reference has been prepared",
    "learning_rate": "set 'lr' in each of trainer.optimizer.param_groups",
    "adap_kl_ctrl": "put another controller in place of trainer.kl_ctl",
    "init_kl_coef": "set trainer.kl_ctl.value",
    "target": "set trainer.kl_ctl.target",
    "horizon": "set trainer.kl_ctl.horizon",
    "is_encoder_decoder": "the trainer has it from its model",
    "is_peft_model": "the trainer has it from its model",
}
"""What a trainer reads once, when it is made, and where to change that afterwards."""


def _positive_integer(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < LARGEST:
        raise ValueError(f"{field.name} is {value!r:.60}, expected an integer of at least 1 and below 2**63")


def _natural(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise ValueError(f"{field.name} is {value!r:.60}, expected an integer of at least 0 and below 2**63")


def _number(low: float, high: float, *, low_open: bool, optional: bool = False) -> Validator:
    """A validator for a finite number in [low, high], or (low, high] if ``low_open``."""
    interval = f"{'(' if low_open else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"

    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if value is None and optional:
            return
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:  # a whole number beyond what a float holds
            number = math.inf
        if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
            raise ValueError(
                f"{field.name} is {value!r}, expected a finite number in {interval}{' or None' if optional else ''}"
            )

    return check


def _one_of(choices: tuple[Any, ...]) -> Validator:
    def check(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        # An array compares with a text entry by entry, so that the kinds come first.
        if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
            raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(map(repr, choices))}")

    return check


def _plain(value: ValueT) -> ValueT:
    """A Python number in place of a scalar of numpy or torch."""
    scalar: Any = value
    return scalar.item() if getattr(scalar, "shape", None) == () else value


def _options(value: Any, field: "attrs.Attribute[Any]") -> JSONDict:
    try:
        if not isinstance(value, Mapping | str | None):  # a list of texts with two letters each would pass for pairs
            raise TypeError
        made: Any = JSONDict
        options = made({} if value is None else value)
    except (TypeError, ValueError):
        # Without the value, and without what has complained about it: it may hold a token.
        raise ValueError(f"{field.name} is a {type(value).__name__}, expected a dictionary, or JSON for one") from None
    for name in options:
        if not isinstance(name, str):
            raise ValueError(f"{field.name} has the key {_without_secrets(name)}, expected names of options")
    return options


def _boolean(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{field.name} is {value!r}, expected True or False")


def _text(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field.name} is {value!r}, expected a text that is not empty")


def _maybe_text(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError(f"{field.name} is {_without_secrets(value)}, expected a text or None")


def number_in_environment(name: str, meaning: str, *, least: int, default: int) -> int:
    """One of torchrun's numbers; the default where the launcher leaves it out, or empty."""
    text = os.environ.get(name) or str(default)
    if not text.strip().isdecimal() or int(text) < least:
        raise ValueError(
            f"{name} is {text!r} in the environment, expected {meaning}, such as {least + 1}; start with "
            f"torchrun --nproc-per-node N, or unset {name}"
        )
    return int(text)


def processes_started() -> int:
    """Processes that train together: those of the process group, else those that torchrun has started, else 1."""
    dist: Any = sys.modules.get("torch.distributed")  # not imported for a number
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return number_in_environment("WORLD_SIZE", "the number of processes", least=1, default=1)


def _script_name() -> str:
    return Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "ppo"


def _without_secrets(value: object) -> str:
    return repr(without_secrets(value))


_POSITIVE = _number(0.0, math.inf, low_open=True)
_NOT_NEGATIVE = _number(0.0, math.inf, low_open=False)
_FRACTION = _number(0.0, 1.0, low_open=False)
_MAYBE_POSITIVE = _number(0.0, math.inf, low_open=True, optional=True)


def _setting(default: Any, validator: Validator) -> Any:
    return attrs.field(default=default, converter=_plain, validator=validator)


def _flag(default: bool) -> Any:
    return _setting(default, _boolean)


def _label(default: str | None) -> Any:
    return attrs.field(default=default, validator=_maybe_text)


def _count(default: int) -> Any:
    return _setting(default, _positive_integer)


_OPTIONS = attrs.Converter(_options, takes_field=True)


def _understood(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's settings by their present names; what neither it nor an earlier release takes is refused."""
    takes = inspect.signature(cls.__init__).parameters
    settings = former_settings.translated(settings, own=takes, stacklevel=3)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        for name in settings:
            if name not in takes:
                raise TypeError(_unknown(cls, name, takes))
    return settings


def _taking_former_names(cls: ConfigT) -> ConfigT:
    """Let the constructor take what earlier releases of TRL called otherwise, from subclasses' as well."""
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *values: Any, **settings: Any) -> None:
        generated(self, *values, **_understood(cls, settings))

    cls.__init__ = __init__
    return cls


def _names(cls: type) -> set[str]:
    """The settings of a configuration, those among them that a subclass has added."""
    added = {name for kind in cls.__mro__ if issubclass(kind, _Standing) for name in inspect.get_annotations(kind)}
    return {*attrs.fields_dict(cls), *added}


def _unknown(cls: type, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{cls.__name__} has no setting {name!r}{f'; did you mean {near[0]}?' if near else ''}"


def _restored(cls: "type[PPOConfig]", values: Mapping[str, Any]) -> "PPOConfig":
    with_attrs_fields(cls, attrs.fields_dict(PPOConfig))
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    object.__setattr__(made, "_standing", "free")
    return made


class _Checked(ABCMeta):
    """The kind of PPOConfig and its subclasses: whoever makes their constructors, what comes out of them is checked.

    A constructor may set what it likes, also behind ``super().__init__``; afterwards only what is there is assigned to.
    """

    if not TYPE_CHECKING:  # which would look at this one's arguments in place of the constructor's

        def __call__(cls, *values: Any, **settings: Any) -> Any:
            with_attrs_fields(cls, attrs.fields_dict(PPOConfig))
            made = super().__call__(*values, **_understood(cls, settings))
            made._check()
            object.__setattr__(made, "_standing", "free")
            former_settings.warn_of_norm_alone(made._values(), stacklevel=2)
            return made

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class _Standing(metaclass=_Checked):
    # Not among what vars() shows. Absent while it is being made; then "free", or "in use" as a trainer's own.
    __slots__ = ("_standing",)


@_taking_former_names
@with_dataclass_fields
@attrs.define(kw_only=True, slots=False, on_setattr=attrs.setters.NO_OP)
class PPOConfig(_Standing):
    """Settings of a :class:`ppo_runtime.PPOTrainer`, named and defaulted as in TRL.

    A value out of range is a ValueError here, with its name and what was expected, and not an odd curve later. That
    holds for an assignment as well, which then changes nothing; to change several settings that must fit together,
    ``attrs.evolve(config, batch_size=64, mini_batch_size=8)``.

    A trainer works with a copy, ``trainer.config``. An assignment to that one is in force from then on, but for what
    the trainer has already built from it: a dataloader keeps its batches, and the names in :data:`FIXED` are refused
    with what to change instead.
    """

    # The run.
    exp_name: str = attrs.field(factory=_script_name, validator=_text)
    """Names the run; metrics go to ``runs/<exp_name>`` unless ``project_kwargs["logging_dir"]`` says otherwise."""
    seed: int = _setting(0, _natural)
    """Of everything random: sampling, the order of the data, the order of the minibatches."""
    log_with: TrackerName | None = attrs.field(default=None, validator=_one_of((None, *get_args(TrackerName))))
    """A tracker beside the JSONL file that is always written."""
    task_name: str | None = _label(None)
    """These four go with the run's settings to the trackers; nothing is loaded by them."""
    model_name: str | None = _label("gpt2")
    query_dataset: str | None = _label("imdb")
    reward_model: str | None = _label("sentiment-analysis:lvwerra/distilbert-imdb")
    remove_unused_columns: bool = _flag(True)
    """Drop columns of a ``datasets.Dataset`` that neither the model nor the trainer reads."""
    drop_last: bool = _flag(True)
    """Drop a last batch shorter than ``batch_size``; False trains on it as well."""
    tracker_kwargs: Options = attrs.field(factory=JSONDict, converter=_OPTIONS, repr=_without_secrets)
    """For the tracker of ``log_with``, plain or under its name: {"wandb": {"entity": "us"}}."""
    accelerator_kwargs: Options = attrs.field(factory=JSONDict, converter=_OPTIONS, repr=_without_secrets)
    """Not used: this runtime has no accelerate. Anything in it is refused."""
    project_kwargs: Options = attrs.field(factory=JSONDict, converter=_OPTIONS, repr=_without_secrets)
    """Where metrics go, as "logging_dir" or else "project_dir"; it takes nothing else."""
    tracker_project_name: str = attrs.field(default="ppo", validator=_text)
    """Project of a Weights & Biases run."""
    push_to_hub_if_best_kwargs: Options = attrs.field(factory=JSONDict, converter=_OPTIONS, repr=_without_secrets)
    """Arguments of ``push_to_hub``, "repo_id" among them: the policy is uploaded whenever its batch has the highest
    mean raw score so far. Empty: never."""
    compare_steps: int = _count(1)
    """Look for the best policy every so many steps."""
    use_habana: bool = _flag(False)
    """Not used: this runtime has no Habana backend. True is refused."""
    accel: str = attrs.field(default="auto", validator=_one_of(ACCELERATORS))
    """How frozen forwards run: "ipex", "eager", or "auto", which takes IPEX where it works. Where it can't be
    used "ipex" is a warning and "auto" a line in the log, and eager torch runs them."""
    accel_strict: bool = _flag(False)
    """An error, which says what to do, instead of eager torch wherever "ipex" or "auto" can't have the extension."""

    # The optimisation.
    steps: int = _count(20000)
    """Sequences to train on in the whole run; ``total_ppo_epochs`` steps of ``batch_size``."""
    learning_rate: float = _setting(1e-5, _POSITIVE)
    batch_size: int = _count(256)
    """Sequences per ``step`` on each rank."""
    mini_batch_size: int = _count(1)
    """Sequences per forward and backward pass."""
    gradient_accumulation_steps: int = _count(1)
    """Minibatches per optimiser step."""
    ppo_epochs: int = _count(4)
    """Passes over a batch."""
    max_grad_norm: float | None = _setting(None, _MAYBE_POSITIVE)
    optimize_device_cache: bool = _flag(False)
    """Empty a GPU's allocator cache after every step."""
    early_stopping: bool = _flag(False)
    """Leave out the remaining epochs of a step once the policy has moved 1.5 ``target_kl`` away from the rollout's."""
    target_kl: float = _setting(1.0, _POSITIVE)
    """Nats per token between the rollout's policy and the present one."""
    ratio_threshold: float = _setting(10.0, _POSITIVE)
    """An update whose mean pi / pi_old exceeds this is left out: neither weights nor moments change."""

    # The objective.
    adap_kl_ctrl: bool = _flag(True)
    init_kl_coef: float = _setting(0.2, _NOT_NEGATIVE)
    """Score units per nat."""
    kl_penalty: KLPenalty = attrs.field(default="kl", validator=_one_of(get_args(KLPenalty)))
    target: float = _setting(6.0, _POSITIVE)
    """Nats per sequence that the adaptive controller holds."""
    horizon: float = _setting(10000.0, _POSITIVE)
    """Sequences over which the coefficient changes by at most 20 %."""
    gamma: float = _setting(1.0, _FRACTION)
    lam: float = _setting(0.95, _FRACTION)
    cliprange: float = _setting(0.2, _POSITIVE)
    cliprange_value: float = _setting(0.2, _POSITIVE)
    vf_coef: float = _setting(0.1, _NOT_NEGATIVE)
    use_score_scaling: bool = _flag(False)
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = _flag(False)
    """Subtract the running mean first; only together with ``use_score_scaling``."""
    score_clip: float | None = _setting(None, _MAYBE_POSITIVE)
    """Keep scores, after scaling, within plus or minus this."""
    whiten_rewards: bool = _flag(False)
    """Scale the rewards per token to variance 1 over the batch and all ranks; their mean stays."""

    # Static shapes for compiled graphs.
    pad_for_acceleration: bool = _flag(False)
    """Give every forward pass the same shape; longer rows are refused, never cut."""
    pad_max_len: int = _setting(0, _natural)
    """Width of prompt and response together; of the response alone for an encoder-decoder."""
    pad_max_input_len: int = _setting(0, _natural)
    """Width of the prompts in generation and in an encoder. 0: as wide as they are."""

    # Found out by the trainer.
    is_encoder_decoder: bool | None = _setting(None, _one_of((None, True, False)))
    is_peft_model: bool | None = _setting(None, _one_of((None, True, False)))

    @classmethod
    def __attrs_init_subclass__(cls) -> None:
        """Called by attrs when it has made a subclass."""
        if vars(cls).get("__attrs_own_setattr__"):  # it would check a field by itself, and know no trainer
            del cls.__setattr__
            setattr(cls, "__attrs_own_setattr__", False)  # noqa: B010  nothing declares it
        with_dataclass_fields(cls)

    def __attrs_post_init__(self) -> None:
        """Check what takes more than one field to check."""
        self._check_together()

    def __post_init__(self) -> None:
        """Check everything; here for the ``super().__post_init__()`` of dataclasses, as TRL has it."""
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign, after every check that the constructor makes; a refused value leaves the old one."""
        standing = getattr(self, "_standing", None)
        if standing is None or name == "_standing":
            return object.__setattr__(self, name, value)
        fields = attrs.fields_dict(type(self))
        own = {name} & {*fields, *vars(self)}
        for known, changed in former_settings.translated({name: value}, own=own, stacklevel=2).items():
            if known not in fields:
                if not self._has_added(known):
                    raise AttributeError(_unknown(type(self), known, _names(type(self))))
                object.__setattr__(self, known, changed)
                continue
            if standing == "in use" and known in FIXED:
                raise ValueError(
                    f"{known} was read when the trainer was made, and setting it to {without_secrets(changed)!r} "
                    f"would do nothing: {FIXED[known]}"
                )
            object.__setattr__(self, known, getattr(self._copy(**{known: changed}), known))
            if known in ("use_score_norm", "use_score_scaling"):
                former_settings.warn_of_norm_alone(self._values(), stacklevel=2)
        return None

    def _has_added(self, name: str) -> bool:
        """Whether a subclass, its constructor or a mixin has brought an attribute, no field, that can be assigned."""
        if name in vars(self):
            return True
        there = inspect.getattr_static(type(self), name, self)  # itself where there is none
        if there is self:
            return name in _names(type(self))
        return there.fset is not None if isinstance(there, property) else not callable(there)

    def _copy(self, **changes: Any) -> "PPOConfig":
        """A checked copy, without repeating warnings that this one gave."""
        copy = object.__new__(type(self))
        for name, value in self._values().items():
            object.__setattr__(copy, name, value)
        for name, value in changes.items():
            field = attrs.fields_dict(type(self))[name]
            object.__setattr__(copy, name, attrs.setters.convert(copy, field, value))
        copy._check()
        return copy

    def _values(self) -> dict[str, Any]:
        fields = (field.name for field in attrs.fields(type(self)))
        return vars(self) | {name: getattr(self, name) for name in fields if hasattr(self, name)}

    def _check(self) -> None:
        """Convert and check every field.

        Ours by our own rules, also where a subclass has another default, and as often as one likes; a subclass's
        converters are not run: its constructor has done so.
        """
        for field in attrs.fields(PPOConfig):
            if not hasattr(self, field.name):
                raise TypeError(
                    f"{type(self).__name__} was made without {field.name}, expected every setting of PPOConfig; call "
                    "super().__init__(**settings) in its constructor"
                )
            value = attrs.setters.convert(self, field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            attrs.setters.validate(self, field, value)
        attrs.validate(self)
        self._check_together()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles belong to no trainer: they can be assigned to, also where this one cannot."""
        return _restored, (type(self), self._values())

    def in_use(self, **found_out: Any) -> "PPOConfig":
        """A copy for a trainer, with the fields that it derived from its model."""
        copy = self._copy(**found_out)
        object.__setattr__(copy, "_standing", "in use")
        return copy

    def _check_together(self) -> None:
        if self.use_habana:
            raise ValueError("use_habana is True, but this runtime has no Habana backend; leave it False")
        if self.accelerator_kwargs:
            raise ValueError(
                f"accelerator_kwargs has {', '.join(map(repr, self.accelerator_kwargs))}, expected to be empty: this "
                "runtime has no accelerate. For several processes start the script with torchrun; for the CPU "
                "backend set accel"
            )
        if unknown := sorted(set(self.project_kwargs) - {"logging_dir", "project_dir"}):
            raise ValueError(
                f"project_kwargs has {', '.join(map(repr, unknown))}, expected 'logging_dir' or 'project_dir' alone: "
                "there is no accelerate to configure; checkpoints go where ppo_runtime.checkpoint is told"
            )
        for name, place in self.project_kwargs.items():
            if place is not None and not isinstance(place, str | Path):
                raise ValueError(
                    f"project_kwargs[{name!r}] is {_without_secrets(place)}, expected the path of a directory"
                )
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ValueError(
                f"push_to_hub_if_best_kwargs has {sorted(self.push_to_hub_if_best_kwargs)}, expected 'repo_id' among "
                "them, as push_to_hub needs it"
            )
        if self.pad_for_acceleration and not self.pad_max_len:
            raise ValueError(
                "pad_max_len is 0, expected the longest prompt + response, since pad_for_acceleration is on"
            )
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of mini_batch_size * "
                f"gradient_accumulation_steps = {self.backward_batch_size}"
            )
        if self.adap_kl_ctrl and self.global_batch_size >= 5 * self.horizon:
            raise ValueError(
                f"horizon is {self.horizon}, expected more than batch_size * world_size / 5 = "
                f"{self.global_batch_size / 5}: one update could make the KL coefficient zero or negative"
            )

    @property
    def world_size(self) -> int:
        """Processes started by torchrun, 1 otherwise."""
        return processes_started()

    @property
    def backward_batch_size(self) -> int:
        """Sequences per optimiser step on one rank."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def updates_of_one_sequence(self) -> int:
        """Optimiser steps per ``step`` if each of them sees one sequence of a large batch, else 0."""
        lonely = self.global_backward_batch_size == 1 and self.batch_size >= LARGE_BATCH
        return self.ppo_epochs * self.batch_size if lonely else 0

    @property
    def global_backward_batch_size(self) -> int:
        """Sequences per optimiser step over all ranks."""
        return self.backward_batch_size * self.world_size

    @property
    def global_batch_size(self) -> int:
        """Sequences per ``step`` over all ranks."""
        return self.batch_size * self.world_size

    @property
    def total_ppo_epochs(self) -> int:
        """Calls of ``step`` that make up ``steps`` sequences, rounded up."""
        return -(-self.steps // self.batch_size)

    @property
    def logging_dir(self) -> Path:
        """Where metrics go."""
        chosen = self.project_kwargs.get("logging_dir") or self.project_kwargs.get("project_dir")
        return Path(chosen or Path("runs") / self.exp_name)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of every field."""
        return attrs.asdict(self)
