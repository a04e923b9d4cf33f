"""Settings that are checked: whoever makes a subclass's constructor, and at every assignment afterwards.

A configuration is a class of attrs that inherits from :class:`CheckedSettings`; its subclasses may be made by attrs, by
dataclasses or by hand.
"""

import difflib
import functools
import inspect
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from ppo_runtime.common import former_settings
from ppo_runtime.common.dataclass_view import with_attrs_fields, with_dataclass_fields
from ppo_runtime.common.redact import without_secrets

KindT = TypeVar("KindT", bound=type)
SettingsT = TypeVar("SettingsT", bound="CheckedSettings")


class Checked(ABCMeta):
    """The kind of a configuration and its subclasses: whatever their constructors make is checked.

    A constructor may set what it likes, also behind ``super().__init__``; afterwards only what is there is assigned to.
    """

    if not TYPE_CHECKING:  # which would look at this one's arguments in place of the constructor's

        def __call__(cls, *values: Any, **settings: Any) -> Any:
            """Make a configuration, by present or former names of its settings, and check it."""
            with_attrs_fields(cls, attrs.fields_dict(_root(cls)))
            made = super().__call__(*values, **_understood(cls, settings))
            made._check()
            object.__setattr__(made, "_standing", "free")
            former_settings.warn_of_norm_alone(made._values(), stacklevel=2)
            return made

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class CheckedSettings(metaclass=Checked):
    """What a configuration inherits: every value is checked, also those assigned to a trainer's own copy."""

    # Not among what vars() shows. Absent while it is being made; then "free", or "in use" as a trainer's own.
    __slots__ = ("_standing",)

    def _check_together(self) -> None:
        """Check what takes more than one field to check."""

    def _fixed(self, name: str) -> str | None:
        """Where to change a setting that a trainer has read already; None if it can be assigned to."""

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
            if standing == "in use":
                self._refuse_fixed(known, changed)
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

    def _copy(self: SettingsT, **changes: Any) -> SettingsT:
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

        The configuration's own by its own rules, also where a subclass has another default, and as often as one likes;
        a subclass's converters are not run: its constructor has done so.
        """
        for field in attrs.fields(_root(type(self))):
            if not hasattr(self, field.name):
                raise TypeError(
                    f"{type(self).__name__} was made without {field.name}, expected every setting of "
                    f"{_root(type(self)).__name__}; call super().__init__(**settings) in its constructor"
                )
            value = attrs.setters.convert(self, field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            attrs.setters.validate(self, field, value)
        attrs.validate(self)
        self._check_together()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles belong to no trainer: they can be assigned to, also where this one cannot."""
        return _restored, (type(self), self._values())

    def _refuse_fixed(self, name: str, value: Any) -> None:
        if (elsewhere := self._fixed(name)) is not None:
            raise ValueError(
                f"{name} was read when the trainer was made, and setting it to {without_secrets(value)!r} would do "
                f"nothing: {elsewhere}"
            )

    def in_use(self: SettingsT, former: SettingsT | None = None, **found_out: Any) -> SettingsT:
        """A copy for a trainer, with the fields that it derived from its model, in place of former settings if any."""
        copy = self._copy(**found_out)
        for name in () if former is None else attrs.fields_dict(_root(type(self))):
            if getattr(copy, name) != getattr(former, name):
                copy._refuse_fixed(name, getattr(copy, name))
        object.__setattr__(copy, "_standing", "in use")
        return copy


def _understood(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's settings by their present names; what neither it nor an earlier release takes is refused."""
    takes = inspect.signature(cls.__init__).parameters
    settings = former_settings.translated(settings, own=takes, stacklevel=3)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        for name in settings:
            if name not in takes:
                raise TypeError(_unknown(cls, name, takes))
    return settings


def taking_former_names(cls: KindT) -> KindT:
    """Let the constructor take what earlier releases of TRL called otherwise, from subclasses' as well."""
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self: Any, *values: Any, **settings: Any) -> None:
        generated(self, *values, **_understood(cls, settings))

    cls.__init__ = __init__
    return cls


def _unknown(cls: type, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{cls.__name__} has no setting {name!r}{f'; did you mean {near[0]}?' if near else ''}"


def _names(cls: type) -> set[str]:
    """The settings of a configuration, those among them that a subclass has added."""
    added = {
        name for kind in cls.__mro__ if issubclass(kind, CheckedSettings) for name in inspect.get_annotations(kind)
    }
    return {*attrs.fields_dict(cls), *added}


def _restored(cls: type, values: Mapping[str, Any]) -> Any:
    with_attrs_fields(cls, attrs.fields_dict(_root(cls)))
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    object.__setattr__(made, "_standing", "free")
    return made


def _root(cls: type) -> Any:
    """The configuration among a class's bases, whose fields are checked by its own rules whatever subclasses do."""
    return next(kind for kind in cls.__mro__ if CheckedSettings in kind.__bases__)
