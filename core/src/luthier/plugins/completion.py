"""Completion of parts: the members that a part must have, and the protocol's defaults for the others."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from luthier.errors import LuthierError
from luthier.plugins.contracts.protocols import PROTOCOLS

if TYPE_CHECKING:
    from luthier.plugins.records import Record

PENALISES: Final = {"weights": "measure", "tokens": "measure_tokens"}  # what a penalty must have
WITHOUT_DEFAULT: Final = frozenset(("scores", "combine"))  # members that only coupled losses have


def _required_members(protocol: type) -> tuple[str, ...]:
    """Return the members that a part itself must have: attributes without a value, and abstract methods."""
    members = vars(protocol)
    attributes = [name for name in members.get("__annotations__", {}) if name not in members]
    methods = [name for name, value in members.items() if getattr(value, "__isabstractmethod__", False)]
    return (*attributes, *methods)


REQUIRED: Final[Mapping[str, tuple[str, ...]]] = types.MappingProxyType(
    {kind: _required_members(protocol) for kind, protocol in PROTOCOLS.items()}
)


def list_members(kind: str) -> tuple[str, ...]:
    """Return every member of a kind's protocol, the required ones first."""
    return (*REQUIRED[kind], *_defaults(kind))


def complete_part(part: Any, kind: str, where: str, record: Record | None = None) -> Any:
    """Return the part with the defaults of its protocol for the optional members that it lacks.

    An attribute that its record has too, such as `mergeable`, takes the record's value. Raises `part-invalid` if a
    required member is missing.
    """
    _refuse_missing([name for name in REQUIRED[kind] if not hasattr(part, name)], kind, where)
    if kind == "loss" and getattr(part, "couples", "nothing") != "nothing":
        _check_coupled(part, where)
    completed = add_defaults(part, kind, record)
    if kind == "penalty" and has_default(completed, kind, name := PENALISES[completed.over]):
        _refuse_missing([name], kind, where)
    return completed


def check_whole(make: Any, kind: str, where: str) -> None:
    """Raise `part-invalid` if a class inherits from its protocol and leaves required methods out."""
    absent: frozenset[str] = getattr(make, "__abstractmethods__", frozenset())
    _refuse_missing([name for name in REQUIRED[kind] if name in absent], kind, where)


def _refuse_missing(names: list[str], kind: str, where: str) -> None:
    if names:
        raise LuthierError("part-invalid", f"does not keep the {kind} protocol: no {', '.join(names)}", where=where)


def add_defaults(part: Any, kind: str, record: Record | None = None) -> Any:
    """Return the part with its protocol's defaults, without the check that required members exist."""
    absent = {name: value for name, value in _defaults(kind).items() if not hasattr(part, name)}
    absent |= {name: getattr(record, name) for name in _attributes(kind) if hasattr(record, name)}
    if hasattr(part, "__dict__"):
        for name, value in absent.items():
            bound = types.MethodType(value, part) if isinstance(value, types.FunctionType) else value
            object.__setattr__(part, name, bound)
    elif absent:  # only the class of an object with slots has room for methods
        owner: Any = type(part)
        object.__setattr__(part, "__class__", _completed_class(owner, tuple(absent.items())))
    return part


def has_default(part: Any, kind: str, name: str) -> bool:
    """Return True if the part leaves a member at its protocol's default."""
    own = getattr(part, name)
    return getattr(own, "__func__", own) is getattr(PROTOCOLS[kind], name)


def _check_coupled(part: Any, where: str) -> None:
    """Raise `part-invalid` if a loss couples something unknown, or lacks what a coupled loss needs."""
    if part.couples != "batch":
        raise LuthierError("part-invalid", "couples is 'nothing' or 'batch'", where=where, found=part.couples)
    inherited = {name: getattr(PROTOCOLS["loss"], name) for name in ("scores", "combine")}
    missing = [n for n, default in inherited.items() if getattr(type(part), n, None) in (None, default)
               and n not in getattr(part, "__dict__", {})]  # fmt: skip
    if missing:
        problem = f"a loss that couples the batch needs {' and '.join(missing)}"
        raise LuthierError("part-invalid", problem, where=where)


@functools.cache
def _defaults(kind: str) -> dict[str, Any]:
    """Return the optional members of a kind's protocol, with their defaults."""
    members = vars(PROTOCOLS[kind])
    own = {name: value for name, value in members.items() if not name.startswith("_") or name == "__call__"}
    return {name: value for name, value in own.items() if name not in WITHOUT_DEFAULT.union(REQUIRED[kind])}


@functools.cache
def _attributes(kind: str) -> tuple[str, ...]:
    """Return the optional members of a kind's protocol that are values and no methods."""
    return tuple(name for name, value in _defaults(kind).items() if not callable(value))


@functools.cache
def _completed_class(cls: type, members: tuple[tuple[str, Any], ...]) -> type:
    """Return a subclass that adds no slots, so that an object of `cls` can be given it as its class."""
    return type(cls.__name__, (cls,), {"__slots__": (), "__module__": cls.__module__, **dict(members)})
