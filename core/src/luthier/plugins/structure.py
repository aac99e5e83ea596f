"""Strict structuring of plain data into typed values through cattrs: another type is refused, not converted."""

from __future__ import annotations

import collections.abc
import contextlib
import enum
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from cattrs import Converter

from luthier.error_lists import TOLD, join_errors
from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.fields.hints import KEY, check_bounds, field_hints, type_name

# YAML 1.1 reads 2e-4 as text, although a number is meant
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|inf")
SEQUENCES: Final = {list: list, tuple: tuple, set: set, frozenset: frozenset, collections.abc.Sequence: list}
FEW: Final = 20  # the most options that a hint lists
MAPPINGS: Final = (dict, collections.abc.Mapping)


@attrs.frozen
class Written:
    """A value from the command line or environment: its text, and what YAML reads it as.

    The option's type decides between them.
    """

    text: str
    value: Any


def bare_value(value: Any) -> Any:
    """Return a value in which every `Written` is replaced by what YAML reads it as."""
    if isinstance(value, Written):
        return bare_value(value.value)
    if isinstance(value, dict):
        return {bare_value(k): bare_value(v) for k, v in value.items()}
    return [bare_value(v) for v in value] if isinstance(value, list) else value


def structure_value(value: object, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`, or raise a `LuthierError` with the option's dotted path, which begins with
    `where`.

    Three things are read as they are meant: an int where a float is expected, a number written as text (`2e-4`), and
    the word `none` where None alone is possible (TOML has no null).
    """
    try:
        return _read(converter(), value, hint)
    except LuthierError as error:
        raise place_error(error, where) from None


def _read(made: Converter, value: object, hint: Any) -> Any:
    if not isinstance(value, Written):
        return made.structure(value, hint)
    try:
        return made.structure(value.value, hint)
    except LuthierError:
        with contextlib.suppress(LuthierError):
            return made.structure(value.text, hint)
        raise


def place_error(error: LuthierError, place: str) -> LuthierError:
    """Return the same error with `place` in front of its dotted path."""
    return error.relocated(lambda where: ".".join(step for step in (place, where) if step) or None)


@functools.cache
def converter() -> Converter:
    made = Converter(detailed_validation=False, forbid_extra_keys=True)
    for kind in (int, float, bool, str, type(None)):
        made.register_structure_hook(kind, _primitive)
    made.register_structure_hook(
        Path, lambda value, _: Path(_primitive(value, str)) if not isinstance(value, Path) else value
    )
    made.register_structure_hook(enum.StrEnum, _member)  # cattrs would take such a class for its base, str
    made.register_structure_hook_func(_is_any, lambda value, _: bare_value(value))
    made.register_structure_hook_func(_is_enum, _member)
    made.register_structure_hook_func(attrs.has, lambda value, cls: _instance(made, value, cls))
    made.register_structure_hook_func(_is_union, lambda value, hint: _union(made, value, hint))
    made.register_structure_hook_func(_is_literal, _literal)
    made.register_structure_hook_func(_is_sequence, lambda value, hint: _sequence(made, value, hint))
    made.register_structure_hook_func(_is_mapping, lambda value, hint: _mapping(made, value, hint))
    return made


def wrong_value(value: object, expected: str) -> LuthierError:
    if bare_value(value) is None:
        remedy = "Leave it out, or write a value of the type named."
        return LuthierError("recipe-wrong-type", f"expected {expected}, and nothing is given", remedy=remedy)
    return LuthierError("recipe-wrong-type", f"expected {expected}", found=bare_value(value))


def _primitive(value: Any, kind: type) -> Any:
    if kind is float:
        if isinstance(value, str) and NUMBER.fullmatch(value):
            value = float(value)
        with contextlib.suppress(OverflowError):  # the int is larger than every float
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
                return float(value)
    elif type(value) is kind:
        return value
    raise wrong_value(value, "none" if kind is type(None) else kind.__name__)


def _is_any(hint: Any) -> bool:
    return hint is Any or hint is object


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _is_sequence(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in SEQUENCES


def _is_mapping(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in MAPPINGS


def _member(value: object, hint: Any) -> object:
    chosen = [m for m in hint if value is m or (m.value == value and type(m.value) is type(value))]
    if not chosen:
        raise wrong_value(value, " | ".join(repr(m.value) for m in hint))
    return chosen[0]


def _literal(value: object, hint: Any) -> object:
    choices = typing.get_args(hint)
    if any(value == c and type(value) is type(c) for c in choices):
        return value
    raise _no_choice(value, (hint,)) or wrong_value(value, " | ".join(repr(c) for c in choices))


def _instance(made: Converter, value: Any, cls: Any) -> object:
    """Return an object of an attrs class from a mapping of its fields. An object of that class is returned as it is."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, collections.abc.Mapping):
        raise wrong_value(value, f"a mapping of {cls.__name__}'s options")
    fields = {f.alias: f for f in attrs.fields(cls) if f.init}
    errors = _unknown_keys(value, fields, field_hints(cls))
    given = {}
    for name, field in fields.items():
        try:
            if name in value:
                given[name] = _inside(made, value[name], field_hints(cls)[field.name], name)
                if KEY in field.metadata:
                    check_bounds(given[name], field.metadata[KEY], name)
            elif field.default is attrs.NOTHING:
                raise LuthierError("recipe-missing", "is required", where=name)
        except LuthierError as error:
            errors.append(error)
    if errors:
        raise join_errors(errors)
    return _made(cls, given)


def _unknown_keys(value: Mapping[Any, Any], fields: Mapping[str, Any], hints: Mapping[str, Any]) -> list[LuthierError]:
    """Return an error for each key that is no option; the first one suggests the nearest option."""
    unknown = [str(key) for key in value if key not in fields]
    remedies = [_of_section(key, hints) or _hint(key, fields) for key in unknown[:TOLD]]
    return [
        LuthierError("recipe-unknown-option", "there is no such option", where=key, remedy=remedy)
        for key, remedy in itertools.zip_longest(unknown, remedies)
    ]


def _of_section(key: str, hints: Mapping[str, Any]) -> str:
    """Return a sentence with the options of this name that belong to a section, such as `data`; empty if none does."""
    sections = [name for name, hint in hints.items() if attrs.has(hint) and key in attrs.fields_dict(hint)]
    return f"Did you mean {' or '.join(repr(f'{name}.{key}') for name in sections)}?" if sections else ""


def _hint(key: str, fields: Mapping[str, Any]) -> str:
    """Return a sentence with the nearest option, or with all options if they are few."""
    near = suggest_nearest(key, fields)
    if not near.startswith("Known") or len(fields) <= FEW:
        return near or "It has none."
    return "`luthier train --help` and docs/options.md list them."


def _made(cls: Any, given: dict[str, Any]) -> object:
    """Make the object. An error of the class's own checks names the option, not the class."""
    try:
        return cls(**given)
    except LuthierError as error:
        raise error.relocated(lambda where: (where or "").removeprefix(f"{cls.__name__}.") or None) from None
    except (TypeError, ValueError) as error:
        raise LuthierError("recipe-out-of-range", f"refused by {cls.__name__}: {error}") from error


def _union(made: Converter, value: object, hint: Any) -> object:
    """Return the value as the first member type that takes it unchanged, else as the first that reads it as meant."""
    members = typing.get_args(hint)
    exact = [m for m in members if type(value) is m or (attrs.has(m) and isinstance(value, m))]
    deepest: LuthierError | None = None
    for member in (*exact, *members):
        try:
            return made.structure(value, member)
        except LuthierError as error:
            if error.where and (deepest is None or not deepest.where):
                deepest = error
    if value == "none" and type(None) in members:
        return None
    raise deepest or _no_choice(value, members) or wrong_value(value, type_name(hint))


def _no_choice(value: object, members: tuple[Any, ...]) -> LuthierError | None:
    """Return an error that names the nearest choice, for a text where one choice or a list of choices is expected."""
    lists = [typing.get_args(member)[0] for member in members if _is_sequence(member) and typing.get_args(member)]
    choices = [choice for kind in (*members, *lists) if _is_literal(kind) for choice in typing.get_args(kind)]
    names = list(dict.fromkeys(choice for choice in choices if isinstance(choice, str)))
    if not isinstance(value, str) or not names:
        return None
    several = [part.strip() for part in value.split(",")]
    near = suggest_nearest(value, names)
    if lists and len(several) > 1:
        near = f"Write several as a list: [{', '.join(several)}]."
    elif value in names:
        near = f"Write it as a list: [{value}]."
    alone = {choice for member in members if _is_literal(member) for choice in typing.get_args(member)}
    inner = [{choice for kind in typing.get_args(member) for choice in typing.get_args(kind)} for member in members]
    kinds = ["a list of these" if i == alone else type_name(m) for m, i in zip(members, inner, strict=True)]
    return LuthierError("recipe-wrong-type", f"expected {' | '.join(kinds)}", found=value,
                        remedy=near if not near.startswith("Known") else None)  # fmt: skip


def _sequence(made: Converter, value: object, hint: Any) -> object:
    origin = typing.get_origin(hint) or hint
    if isinstance(value, (set, frozenset)) and origin in (set, frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, str) and value:
        remedy = f"Write it as a list: [{value}]."
        raise LuthierError("recipe-wrong-type", "expected a list", found=value, remedy=remedy)
    if not isinstance(value, (list, tuple)):
        raise wrong_value(value, "a list")
    arguments = [a for a in typing.get_args(hint) if a is not Ellipsis]
    if origin is tuple and arguments and Ellipsis not in typing.get_args(hint):
        if len(arguments) != len(value):
            raise wrong_value(value, f"a list of {len(arguments)}")
        each = arguments
    else:
        each = [arguments[0] if arguments else Any] * len(value)
    pairs = enumerate(zip(value, each, strict=True))
    return SEQUENCES[origin](_all_inside(made, ((item, kind, str(i)) for i, (item, kind) in pairs)))


def _mapping(made: Converter, value: object, hint: Any) -> object:
    if not isinstance(value, collections.abc.Mapping):
        raise wrong_value(value, "a mapping")
    key, item = typing.get_args(hint) or (Any, Any)
    keys = _all_inside(made, ((k, key, str(k)) for k in value))
    return dict(zip(keys, _all_inside(made, ((v, item, str(k)) for k, v in value.items())), strict=True))


def _all_inside(made: Converter, values: Iterable[tuple[object, Any, str]]) -> list[Any]:
    """Return each value as its type. Raises the errors of all of them at once, up to as many as are told."""
    read: list[Any] = []
    errors: list[LuthierError] = []
    for value, hint, place in values:
        try:
            read.append(_inside(made, value, hint, place))
        except LuthierError as error:
            errors.append(error)
            if len(errors) > TOLD:
                break
    if errors:
        raise join_errors(errors)
    return read


def _inside(made: Converter, value: object, hint: Any, place: str) -> Any:
    try:
        return _read(made, value, hint)
    except LuthierError as error:
        raise place_error(error, place) from None
