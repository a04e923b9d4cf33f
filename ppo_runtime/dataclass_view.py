"""What HfArgumentParser, tyro and dataclasses.fields, asdict and replace need to see in an attrs class."""

import dataclasses
import typing
from json import loads
from typing import Any, TypeVar

import attrs

ClassT = TypeVar("ClassT", bound=type)


class JSONDict(dict[str, Any]):
    """A dictionary that can also be made from JSON, as a command line gives it.

    The argument's name and annotation are for tyro, whose option is then ``--tracker-kwargs.json``; anything that
    ``dict`` takes will do.

    Raises:
        ValueError: the text is no JSON, or none of an object.
    """

    def __init__(self, json: str = "{}") -> None:
        source: Any = loads(json) if isinstance(json, str) else json
        if isinstance(json, str) and not isinstance(source, dict):
            raise ValueError(f'got {json!r}, expected a JSON object such as {{"key": "value"}}')
        super().__init__(source)


def with_dataclass_fields(cls: ClassT) -> ClassT:
    """Give an attrs class the fields that ``dataclasses`` looks for; it stays what attrs has made."""
    hints = typing.get_type_hints(cls)
    fields = [(field.name, hints[field.name], _dataclass_field(field)) for field in attrs.fields(cls) if field.init]
    made = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)
    for name in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(cls, name, getattr(made, name))
    return cls


def _dataclass_field(field: "attrs.Attribute[Any]") -> Any:
    default: Any = field.default
    # What attrs shows in its own way, such as without its secrets, a dataclass that inherits it does not show.
    shown = field.repr is True
    if hasattr(default, "factory"):
        return dataclasses.field(default_factory=default.factory, kw_only=True, repr=shown)
    return dataclasses.field(default=default, kw_only=True, repr=shown)
