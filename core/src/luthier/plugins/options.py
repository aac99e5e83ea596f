"""Options: one frozen attrs class per part, made of `option()` fields that know their bounds and meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import attrs

from luthier.errors import LuthierError
from luthier.plugins.fields.hints import KEY, Bounds, check_bounds, field_hints, type_name
from luthier.plugins.structure import structure_value

__all__ = [
    "KEY",
    "Bounds",
    "Described",
    "check_bounds",
    "describe_options",
    "field_hints",
    "is_default",
    "option",
    "type_name",
]


def option(
    default: Any = attrs.NOTHING,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """Return a field of an options class. `low` and `high` are inclusive; None means no bound.

    Bounds apply to a number and to each number of a list. Without `default` and `factory` the option is required.
    Values are structured strictly when the object is made, so a float option holds a float and a list option a list.
    """
    bounds = Bounds(help=help, low=low, high=high, choices=tuple(choices) if choices is not None else None)
    strictly = attrs.Converter(_settle, takes_self=True, takes_field=True)
    if factory is not None:
        return attrs.field(factory=factory, converter=strictly, metadata={KEY: bounds})
    return attrs.field(default=default, converter=strictly, metadata={KEY: bounds})


def _settle(value: object, instance: object, field: attrs.Attribute[Any]) -> object:
    cls: type = type(instance)
    where = f"{cls.__name__}.{field.name}"
    settled = structure_value(value, field_hints(cls)[field.name], where)
    check_bounds(settled, field.metadata[KEY], where)
    return settled


@attrs.frozen(kw_only=True)
class Described:
    """One option in the form shown in `plugins show`, `--help` and the generated pages."""

    name: str
    type: str
    default: Any
    required: bool
    bounds: Bounds


def describe_options(cls: type) -> list[Described]:
    """Return every option of an options class, in the order of definition."""
    return [
        Described(
            name=field.name,
            type=type_name(field_hints(cls)[field.name]),
            default=_default(field),
            required=field.default is attrs.NOTHING,
            bounds=field.metadata.get(KEY) or Bounds(help=""),
        )
        for field in attrs.fields(cls)
    ]


def is_default(options: Any) -> bool:
    """Return True if an options object holds nothing but its class's defaults."""
    cls = type(options)
    if any(f.default is attrs.NOTHING for f in attrs.fields(cls)):
        return False
    with contextlib.suppress(LuthierError):  # a class whose defaults are refused together has no default object
        return bool(options == cls())
    return False


def _default(field: attrs.Attribute[Any]) -> Any:
    default: Any = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default.factory()
    return None if default is attrs.NOTHING else default
