"""Kinds of settings: fields of a configuration, with what converts and checks their values."""

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from ppo_runtime.common.dataclass_view import JSONDict
from ppo_runtime.common.redact import without_secrets

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]
if TYPE_CHECKING:
    Options = dict[str, Any]
else:  # what a command line's text is turned into
    Options = JSONDict
ValueT = TypeVar("ValueT")

LARGEST = 2**63
"""Whole numbers are below it: torch holds no larger ones, and a float none of hundreds of digits."""


def positive_integer(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    """A whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < LARGEST:
        raise ValueError(f"{field.name} is {value!r:.60}, expected an integer of at least 1 and below 2**63")


def natural(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    """A whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise ValueError(f"{field.name} is {value!r:.60}, expected an integer of at least 0 and below 2**63")


def number(low: float, high: float, *, low_open: bool, optional: bool = False) -> Validator:
    """A validator for a finite number in [low, high], or (low, high] if ``low_open``."""
    interval = f"{'(' if low_open else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"

    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if value is None and optional:
            return
        try:
            found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:  # a whole number beyond what a float holds
            found = math.inf
        if not math.isfinite(found) or not low <= found <= high or (low_open and found == low):
            raise ValueError(
                f"{field.name} is {value!r:.60}, expected a finite number in {interval}{' or None' if optional else ''}"
            )

    return check


def one_of(choices: tuple[Any, ...]) -> Validator:
    """A validator for one of some values."""

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
        found = made({} if value is None else value)
    except (TypeError, ValueError):
        # Without the value, and without what has complained about it: it may hold a token.
        raise ValueError(f"{field.name} is a {type(value).__name__}, expected a dictionary, or JSON for one") from None
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"{field.name} has the key {shown_without_secrets(name)}, expected names of options")
    return found


def boolean(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{field.name} is {value!r:.60}, expected True or False")


def text(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field.name} is {value!r}, expected a text that is not empty")


def maybe_text(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    """A text, a path or None."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError(f"{field.name} is {shown_without_secrets(value)}, expected a text or None")


def shown_without_secrets(value: object) -> str:
    """What is printed of a value that may hold a token."""
    return repr(without_secrets(value))


POSITIVE = number(0.0, math.inf, low_open=True)
NOT_NEGATIVE = number(0.0, math.inf, low_open=False)
FRACTION = number(0.0, 1.0, low_open=False)
MAYBE_POSITIVE = number(0.0, math.inf, low_open=True, optional=True)


def setting(default: Any, validator: Validator) -> Any:
    """A field that also takes a scalar of numpy or torch."""
    return attrs.field(default=default, converter=_plain, validator=validator)


def flag(default: bool) -> Any:
    """A field that is True or False."""
    return setting(default, boolean)


def label(default: str | None) -> Any:
    """A field that nothing reads but people."""
    return attrs.field(default=default, validator=maybe_text)


def count(default: int) -> Any:
    """A field for how many of something."""
    return setting(default, positive_integer)


OPTIONS = attrs.Converter(_options, takes_field=True)
"""What makes a dictionary of JSON for one, and a copy of one that is given."""
