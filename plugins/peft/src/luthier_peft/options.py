"""Options classes made from PEFT's own configuration classes: same names, types, defaults and help."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
import typing
from typing import Any, Final, Literal

import attrs
import peft
from luthier import LuthierError, option

from luthier_peft import omitted
from luthier_peft.listing import config_names

PREFIX: Final = "peft."
SCALARS: Final = (int, float, bool, str, type(None))
CONTAINERS: Final = (dict, list, tuple)


def options_for(record_name: str) -> type:
    """Return the options class of the part `peft.<method>`, the same object each time."""
    return options_class(record_name.removeprefix(PREFIX))


@functools.cache
def options_class(method: str) -> type:
    """Return a frozen class whose attribute `method` names the method."""
    config = config_class(method)
    made = {f.name: f for f in dataclasses.fields(config) if reason_omitted(method, f) is None}
    hints = {name: hint_of(method, field) for name, field in made.items()}
    body = {name: _option(method, field) for name, field in made.items()}
    about = {"__doc__": f"Options of `peft.{method}`.", "__module__": __name__, "method": method}
    cls = type(config.__name__, (), {**body, **about, "__annotations__": hints})
    return attrs.frozen(kw_only=True)(cls)


def config_class(method: str) -> Any:
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.upper())]


def reason_omitted(method: str, field: dataclasses.Field[Any]) -> str | None:
    """Return why an option of PEFT is not offered, or None if it is."""
    known = omitted.OF_METHOD.get(method, {}).get(field.name) or omitted.EVERYWHERE.get(field.name)
    if known:
        return known
    return _unwritable(_hints(method)[field.name])


def hint_of(method: str, field: dataclasses.Field[Any]) -> Any:
    """Return the type of a field for a recipe. None is added if it is the default but not in the type."""
    if field.name == "bias" and _hints(method)["bias"] is str:  # PEFT's own check, in the tuners' common base
        return Literal["none", "all", f"{method}_only"]
    hint = _expressed(_hints(method)[field.name], set(omitted.CHOICES.get((method, field.name), {})))
    return hint | None if default_of(field) is None else hint


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a fresh default of a field, or `attrs.NOTHING` if it is required."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return attrs.NOTHING if field.default_factory is dataclasses.MISSING else field.default_factory()


def to_config(options: Any, **fixed: Any) -> Any:
    """Return PEFT's config with these options. Raises `recipe-out-of-range` with PEFT's words if it refuses."""
    given = {f.name: copy.deepcopy(getattr(options, f.name)) for f in attrs.fields(type(options))}
    if isinstance(given.get("modules_to_save"), str):  # PEFT would read it letter by letter
        given["modules_to_save"] = [given["modules_to_save"]]
    where = f"adapter {PREFIX}{options.method}"
    try:
        return config_class(options.method)(**(given | {"task_type": "CAUSAL_LM"} | fixed))
    except ImportError as error:
        raise LuthierError("dependency-missing", str(error), where=where, remedy="Install what PEFT names.") from error
    except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
        remedy = "Change the options that PEFT names."
        raise LuthierError("recipe-out-of-range", f"PEFT says: {error}", where=where, remedy=remedy) from error


def _option(method: str, field: dataclasses.Field[Any]) -> Any:
    text = " ".join(str(field.metadata.get("help") or f"See {config_class(method).__name__} of PEFT.").split())
    if field.default_factory is not dataclasses.MISSING:
        return option(factory=field.default_factory, help=text)
    return option(default_of(field), help=text)


@functools.cache
def _hints(method: str) -> dict[str, Any]:
    return typing.get_type_hints(config_class(method))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _unwritable(hint: Any) -> str | None:
    """Return why a type cannot be an option's, or None if it can."""
    if dataclasses.is_dataclass(hint):
        return omitted.NESTED
    if hint in SCALARS or hint in CONTAINERS or hint in (Any, Ellipsis) or typing.get_origin(hint) is Literal:
        return None
    if not (_is_union(hint) or typing.get_origin(hint) in CONTAINERS):
        return omitted.UNWRITABLE
    return next((reason for a in typing.get_args(hint) if (reason := _unwritable(a))), None)


def _expressed(hint: Any, without: set[Any]) -> Any:
    """Return a type without some of its choices. A union of `str` and literals becomes the literals."""
    if hint in (dict, list):
        return dict[str, Any] if hint is dict else list[Any]
    if typing.get_origin(hint) is Literal:
        return Literal[tuple(c for c in typing.get_args(hint) if c not in without)]
    if not _is_union(hint):
        return hint
    literals = [m for m in typing.get_args(hint) if typing.get_origin(m) is Literal]
    emptied = [m for m in literals if not set(typing.get_args(m)) - without]
    members = [m for m in typing.get_args(hint) if m not in emptied and not (literals and m is str)]
    return typing.Union[tuple(_expressed(m, without) for m in members)]  # noqa: UP007


def __getattr__(name: str) -> Any:
    """Return `options.LoraConfig` and the like, made at the first use."""
    for method, config in config_names().items():
        if config == name:
            return options_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
