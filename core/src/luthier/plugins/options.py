"""Options: one frozen attrs class per part, made of `option()` fields that know their bounds and meaning."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any

import attrs

from luthier.errors import LuthierError
from luthier.plugins.structure import structure

KEY = "luthier.option"


@attrs.frozen(kw_only=True)
class Bounds:
    """What an option's field carries beside its type and default."""

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None


def option(
    default: Any = attrs.NOTHING,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    factory: Callable[[], Any] | None = None,
) -> Any:
    """A field of an options class. `low` and `high` are inclusive; None means no bound.

    Bounds hold for numbers and for each number of a list. Without `default` and `factory` the option is required.
    """
    bounds = Bounds(help=help, low=low, high=high, choices=tuple(choices) if choices is not None else None)
    if factory is not None:
        return attrs.field(factory=factory, validator=_validate, metadata={KEY: bounds})
    return attrs.field(default=default, validator=_validate, metadata={KEY: bounds})


def _validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    cls = type(instance)
    where = f"{cls.__name__}.{attribute.name}"
    structure(value, hints(cls)[attribute.name], where)
    check_bounds(value, attribute.metadata[KEY], where)


def check_bounds(value: object, bounds: Bounds, where: str) -> None:
    """Raise `recipe-out-of-range` where a value leaves its bounds or choices."""
    if bounds.choices is not None and value is not None and value not in bounds.choices:
        allowed = ", ".join(str(c) for c in bounds.choices)
        raise LuthierError(
            "recipe-out-of-range",
            "not one of the choices",
            where=where,
            found=value,
            remedy=f"Choose one of: {allowed}.",
        )
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        low, high = bounds.low, bounds.high
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            span = f"from {'any' if low is None else low} to {'any' if high is None else high}"
            raise LuthierError(
                "recipe-out-of-range", "outside its bounds", where=where, found=number, remedy=f"Give a number {span}."
            )


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved type of each field of an options class."""
    return typing.get_type_hints(cls)


@attrs.frozen(kw_only=True)
class Described:
    """One option as it is shown: in `plugins show`, `--help` and the generated pages."""

    name: str
    type: str
    default: Any
    required: bool
    bounds: Bounds


def describe(cls: type) -> list[Described]:
    """Every option of an options class, in the order of its definition."""
    return [
        Described(
            name=field.name,
            type=type_name(hints(cls)[field.name]),
            default=_default(field),
            required=field.default is attrs.NOTHING,
            bounds=field.metadata.get(KEY) or Bounds(help=""),
        )
        for field in attrs.fields(cls)
    ]


def _default(field: attrs.Attribute[Any]) -> Any:
    default: Any = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default.factory()
    return None if default is attrs.NOTHING else default


def type_name(hint: Any) -> str:
    """A type as people write it: `int`, `float | None`, `list[str]`, `'a' | 'b'`."""
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) is not None and typing.get_args(hint):
        arguments = [type_name(a) for a in typing.get_args(hint)]
        name = getattr(typing.get_origin(hint), "__name__", "")
        return " | ".join(arguments) if name in ("UnionType", "Union") else f"{name}[{', '.join(arguments)}]"
    return getattr(hint, "__name__", str(hint))
