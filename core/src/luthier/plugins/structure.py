"""Strict structuring: plain data into typed values through cattrs, refusing whatever would be converted."""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import attrs
from cattrs import Converter

from luthier.errors import LuthierError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # YAML 1.1 reads 2e-4 as text; it is meant as a number


def structure(value: object, hint: Any, where: str) -> Any:
    """`value` as a `hint`, or a `LuthierError` that names the place within `where`.

    Only an int where a float is asked for, and a number written as text (`2e-4`), are read as meant.
    """
    try:
        return converter().structure(value, hint)
    except LuthierError as error:
        raise error.at(where) from None


@functools.cache
def converter() -> Converter:
    made = Converter(detailed_validation=False, forbid_extra_keys=True)
    for kind in (int, float, bool, str, type(None)):
        made.register_structure_hook(kind, _primitive)
    made.register_structure_hook(
        Path, lambda value, _: Path(_primitive(value, str)) if not isinstance(value, Path) else value
    )
    made.register_structure_hook_func(_is_any, lambda value, _: value)
    made.register_structure_hook_func(_is_union, lambda value, hint: _union(made, value, hint))
    made.register_structure_hook_func(_is_literal, _literal)
    made.register_structure_hook_func(_is_sequence, lambda value, hint: _sequence(made, value, hint))
    made.register_structure_hook_func(_is_mapping, lambda value, hint: _mapping(made, value, hint))
    return made


def wrong(value: object, expected: str) -> LuthierError:
    return LuthierError("recipe-wrong-type", f"expected {expected}", found=value)


def _primitive(value: Any, kind: type) -> Any:
    if kind is float:
        if isinstance(value, str) and NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    elif type(value) is kind:
        return value
    raise wrong(value, "none" if kind is type(None) else kind.__name__)


def _is_any(hint: Any) -> bool:
    return hint is Any or hint is object


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _is_sequence(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (list, tuple)


def _is_mapping(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) is dict


def _literal(value: object, hint: Any) -> object:
    choices = typing.get_args(hint)
    if any(value == c and type(value) is type(c) for c in choices):
        return value
    raise wrong(value, " | ".join(repr(c) for c in choices))


def _union(made: Converter, value: object, hint: Any) -> object:
    """The first member that takes the value as it is; else the first that reads it as meant."""
    members = typing.get_args(hint)
    exact = [m for m in members if type(value) is m or (attrs.has(m) and isinstance(value, m))]
    deepest: LuthierError | None = None
    for member in (*exact, *members):
        try:
            return made.structure(value, member)
        except LuthierError as error:
            if error.where and (deepest is None or not deepest.where):
                deepest = error
    from luthier.plugins.options import type_name

    raise deepest or wrong(value, type_name(hint))


def _sequence(made: Converter, value: object, hint: Any) -> object:
    origin = typing.get_origin(hint) or hint
    if not isinstance(value, (list, tuple)):
        raise wrong(value, "a list")
    arguments = [a for a in typing.get_args(hint) if a is not Ellipsis]
    if origin is tuple and len(arguments) > 1 and Ellipsis not in typing.get_args(hint):
        if len(arguments) != len(value):
            raise wrong(value, f"a list of {len(arguments)}")
        each = arguments
    else:
        each = [arguments[0] if arguments else Any] * len(value)
    return origin(_inside(made, item, kind, f"[{i}]") for i, (item, kind) in enumerate(zip(value, each, strict=True)))


def _mapping(made: Converter, value: object, hint: Any) -> object:
    if not isinstance(value, dict):
        raise wrong(value, "a mapping")
    key, item = typing.get_args(hint) or (Any, Any)
    return {_inside(made, k, key, "key"): _inside(made, v, item, str(k)) for k, v in value.items()}


def _inside(made: Converter, value: object, hint: Any, place: str) -> Any:
    try:
        return made.structure(value, hint)
    except LuthierError as error:
        raise error.at(place) from None
