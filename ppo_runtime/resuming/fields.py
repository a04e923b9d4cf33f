"""Kinds of fields of a checkpoint's records, and how a record is made of what a file holds."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import torch

from ppo_runtime.common.setting_kinds import Validator, number

RecordT = TypeVar("RecordT")
LARGEST = torch.finfo(torch.float32).max
"""No number of a run is larger: weights and rates are float32 at least once."""
FINITE = number(-LARGEST, LARGEST, low_open=False)
ADDED = "added"
"""In the metadata of a field that the first checkpoints of its format lack."""
_DIGEST = re.compile("[0-9a-f]{64}")


def record(kind: type[RecordT], found: Any, where: str) -> RecordT:
    """A record of that kind, made of what a file holds; fields that only a later version knows are left out.

    Raises:
        ValueError: a field is missing or is not what it must be, by its place and name.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is a {type(found).__name__}, expected fields with names")
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(kind)
    for field in fields:
        if field.default is attrs.NOTHING and field.name not in found:
            raise ValueError(f"{where} has no {field.name!r}")
    try:
        return kind(**{field.name: found[field.name] for field in fields if field.name in found})
    except ValueError as error:
        raise ValueError(f"{where} does not hold: {error}") from error


def check_complete(kind: type, found: Mapping[str, Any], where: str) -> None:
    """Refuse a record of the present format without one of its fields, which only older ones may lack."""
    for field in attrs.fields(kind):
        if field.name not in found and not field.metadata.get(ADDED):
            raise ValueError(f"{where} has no {field.name!r}")


def that(what: str, holds: Callable[[Any], bool]) -> Validator:
    """A validator for what a value is said to be; where asking raises, it is not."""

    def check(_: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
        try:
            fine = holds(value)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            fine = False
        if not fine:
            raise ValueError(f"{field.name} is {value!r:.60}, expected {what}")

    return check


def is_digest(value: Any) -> bool:
    """A SHA-256, in hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_whole(value: Any, low: int = 0, high: int = 2**53) -> bool:
    """A whole number from ``low`` and below ``high``."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def maybe(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """That, or nothing."""
    return lambda value: value is None or holds(value)


def every(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list of that."""
    return lambda value: isinstance(value, list | tuple) and all(map(holds, value))


def by_name(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A mapping from texts to that."""
    return lambda value: isinstance(value, Mapping) and all(is_text(key) and holds(item) for key, item in value.items())


def is_finite(value: Any) -> bool:
    """A number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
