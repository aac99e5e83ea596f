"""Facts about an options field: its resolved type, its bounds, and how both are written for people."""

from __future__ import annotations

import functools
import typing
from typing import Any, Final

import attrs

from luthier.errors import LuthierError

KEY: Final = "luthier.option"


@attrs.frozen(kw_only=True)
class Bounds:
    """The facts that an option's field carries besides its type and default."""

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None


def check_bounds(value: object, bounds: Bounds, where: str) -> None:
    """Raise `recipe-out-of-range` if a value, or an item of a list, is outside its bounds or choices."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        _check_choice(item, bounds, where)
        _check_span(item, bounds, where)


def _check_choice(value: object, bounds: Bounds, where: str) -> None:
    if bounds.choices is None or value is None or value in bounds.choices:
        return
    allowed = ", ".join(str(c) for c in bounds.choices)
    remedy = f"Choose one of: {allowed}."
    raise LuthierError("recipe-out-of-range", "not one of the choices", where=where, found=value, remedy=remedy)


def _check_span(number: object, bounds: Bounds, where: str) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return
    low, high = bounds.low, bounds.high
    if (low is None or number >= low) and (high is None or number <= high):
        return
    ends = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    remedy = f"Give a number of {' and '.join(ends)}."
    raise LuthierError("recipe-out-of-range", "outside its bounds", where=where, found=number, remedy=remedy)


@functools.cache
def field_hints(cls: type) -> dict[str, Any]:
    """Return the resolved type of each field of an options class."""
    return typing.get_type_hints(cls)


def type_name(hint: Any) -> str:
    """Return a type as people write it: `int`, `float | none`, `list[str]`, `'a' | 'b'`, `{model: ...}`."""
    if hint is type(None):
        return "none"
    if hint is Ellipsis:
        return "..."
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(repr(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) is not None and typing.get_args(hint):
        arguments = [type_name(a) for a in typing.get_args(hint)]
        name = getattr(typing.get_origin(hint), "__name__", "")
        return " | ".join(arguments) if name in ("UnionType", "Union") else f"{name}[{', '.join(arguments)}]"
    if attrs.has(hint):  # written as a mapping that shows its required fields
        needed = [f"{field.name}: ..." for field in attrs.fields(hint) if field.default is attrs.NOTHING]
        return "{" + ", ".join(needed) + "}" if needed else hint.__name__
    return getattr(hint, "__name__", str(hint))
