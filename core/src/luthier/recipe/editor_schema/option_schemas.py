"""The JSON schema of an option: the values that structuring accepts for its type, with bounds, default and meaning."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.plugins.fields.hints import KEY, Bounds, field_hints
from luthier.plugins.structure import MAPPINGS, NUMBER, SEQUENCES
from luthier.recipe.parts import plain_value
from luthier.recipe.reading.paths import VARIABLE

Schema = dict[str, Any]
VARIABLE_TEXT: Final[Schema] = {"type": "string", "pattern": VARIABLE.pattern}  # a variable may expand to any text
WORDS: Final[Schema] = {"$ref": "#/$defs/variable"}
FLOAT: Final[Schema] = {"$ref": "#/$defs/float"}
SHARED: Final[Mapping[str, Schema]] = types.MappingProxyType(
    {
        "variable": VARIABLE_TEXT,
        "float": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": f"^({NUMBER.pattern})$"}, VARIABLE_TEXT]},
    }
)
PLAIN: Final[Mapping[Any, Schema]] = types.MappingProxyType(
    {
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: FLOAT,
        str: {"type": "string"},
        Path: {"type": "string"},
        type(None): {"enum": [None, "none"]},
    }
)
OfClass = Callable[[type], Schema]


def options_schema(cls: type, extra: Mapping[str, Schema] | None = None) -> Schema:
    """Return the schema of a mapping that holds the options of a class, and those in `extra`."""
    hints = field_hints(cls)
    own = {field.alias: option_schema(field, value_schema(hints[field.name], bounds_of(field)))
           for field in attrs.fields(cls) if field.init}  # fmt: skip
    return closed_object({**(extra or {}), **own})


def closed_object(properties: Mapping[str, Schema]) -> Schema:
    """Return the schema of a mapping that has no other keys than these."""
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def option_schema(field: attrs.Attribute[Any], value: Schema) -> Schema:
    """Return the schema of a value with the meaning and the default of its option."""
    schema = {"description": bounds_of(field).help, **value}
    default: Any = field.default
    default = default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]
    infinite = isinstance(default, float) and not math.isfinite(default)  # JSON has no such numbers
    return schema if default is attrs.NOTHING or infinite else {**schema, "default": plain_value(default)}


def bounds_of(field: attrs.Attribute[Any]) -> Bounds:
    """Return the bounds and meaning of a field; empty ones for a field that is no option."""
    bounds: Bounds = field.metadata.get(KEY) or Bounds(help="")
    return bounds


def value_schema(hint: Any, bounds: Bounds, of_class: OfClass | None = None) -> Schema:
    """Return the schema of values of type `hint`. `of_class` returns the schema of an attrs class inside it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [value_schema(member, bounds, of_class) for member in arguments]}
    if origin is typing.Literal or (isinstance(hint, type) and issubclass(hint, Enum)):
        return enumeration(arguments or [member.value for member in hint])
    if attrs.has(hint):
        return (of_class or options_schema)(hint)
    if (origin or hint) in (*SEQUENCES, *MAPPINGS):
        return _container(hint, bounds, of_class)
    return _bounded(PLAIN[hint], hint, bounds) if hint in PLAIN else {}


def enumeration(values: typing.Iterable[Any]) -> Schema:
    """Return the schema of one of these values, or of a text whose variables may expand to one."""
    chosen = list(values)
    texts = any(isinstance(value, str) for value in chosen)
    return {"anyOf": [{"enum": chosen}, WORDS]} if texts else {"enum": chosen}


def _container(hint: Any, bounds: Bounds, of_class: OfClass | None) -> Schema:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in MAPPINGS:  # the bounds do not apply to items of a mapping
        item = value_schema(arguments[1] if arguments else Any, Bounds(help=""), of_class)
        return {"type": "object", "additionalProperties": item}
    if origin is tuple and arguments and Ellipsis not in arguments:
        items = [value_schema(argument, bounds, of_class) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    return {"type": "array", "items": value_schema(arguments[0] if arguments else Any, bounds, of_class)}


def _bounded(schema: Schema, hint: Any, bounds: Bounds) -> Schema:
    if hint is type(None):
        return schema
    if bounds.choices is not None:
        return enumeration(bounds.choices)
    if hint not in (int, float):
        return schema
    ends = {"minimum": bounds.low, "maximum": bounds.high}
    return {**schema, **{name: end for name, end in ends.items() if end is not None}}
