"""One class for attrs and for dataclasses: what HfArgumentParser, tyro, dataclasses.replace and attrs.evolve see."""

import dataclasses
from collections.abc import Container
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
    """Give an attrs class the fields that ``dataclasses`` looks for; it stays what attrs has made.

    Raises:
        TypeError: it inherits from a dataclass fields that attrs does not know.
    """
    known: Any = cls
    inherited = {field.name for field in dataclasses.fields(known)} if dataclasses.is_dataclass(known) else set[str]()
    if unseen := inherited - attrs.fields_dict(cls).keys():
        raise TypeError(
            f"{cls.__name__} is made by attrs and inherits {', '.join(sorted(unseen))} from a dataclass, which attrs "
            "does not see, expected one decorator for both; use @dataclasses.dataclass"
        )
    fields = [(field.name, field.type or Any, _dataclass_field(field)) for field in attrs.fields(cls) if field.init]
    made = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)
    for name in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(cls, name, getattr(made, name))
    return cls


def with_attrs_fields(cls: type, own: Container[str]) -> None:
    """Give a dataclass whose base is an attrs class the fields that attrs looks for, unless it has them.

    Args:
        cls: the class, whose bases are looked at as well.
        own: the fields whose converters are run whoever makes the constructor.

    Raises:
        TypeError: one of its fields has another converter, which the constructor of dataclasses does not run.
    """
    for kind in reversed(cls.__mro__):
        mine: Any = kind
        if not attrs.has(kind) or "__attrs_attrs__" in vars(kind) or "__dataclass_fields__" not in vars(kind):
            continue
        known = attrs.fields_dict(mine)
        for name, field in known.items():
            if field.converter is not None and name not in own:
                raise TypeError(
                    f"{kind.__name__} is a dataclass and inherits {name} with a converter of attrs, which dataclasses "
                    "does not run, expected one decorator for both; use @attrs.define"
                )
        added = {
            field.name: attrs.field(default=_attrs_default(field), init=field.init, kw_only=True)
            for field in dataclasses.fields(mine)
            if field.name not in known
        }
        base = type(kind.__name__, (), {"__attrs_attrs__": attrs.fields(mine)})
        mine.__attrs_attrs__ = attrs.fields(attrs.make_class(kind.__name__, added, bases=(base,)))


def _attrs_default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return attrs.Factory(field.default_factory)
    return attrs.NOTHING if field.default is dataclasses.MISSING else field.default


def _dataclass_field(field: "attrs.Attribute[Any]") -> Any:
    default: Any = field.default
    # What attrs shows in its own way, such as without its secrets, a dataclass that inherits it does not show.
    shown = field.repr is True
    if hasattr(default, "factory"):
        return dataclasses.field(default_factory=default.factory, kw_only=True, repr=shown)
    if default is attrs.NOTHING:
        return dataclasses.field(kw_only=True, repr=shown)
    return dataclasses.field(default=default, kw_only=True, repr=shown)
