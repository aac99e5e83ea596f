"""Lazy values: what modules keep in globals, caches, containers and classes, noted so that it can be put back."""

from __future__ import annotations

import functools
import gc
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any, Final, Protocol

import torch
from torch import nn

LRU: Final = type(functools.cache(lambda: None))
# types that are no numbers of a tensor
NAMELESS: Final = (bool, str, bytes, type(None), type, ModuleType, FunctionType)
# exactly these types and no subclasses: looking into a lazy mapping of transformers would load what it holds
CONTAINERS: Final = (dict, OrderedDict, defaultdict, list, set, frozenset, deque, tuple)
ABSENT: Final = object()
MOST: Final = 10_000  # items beyond which a container is data and not a table
REACHED: Final = 200_000  # values that are looked at in all


class Kept(Protocol):
    """Something that was noted."""

    def restore(self) -> None:
        """Put back what was there, where numbers or tensors have come in its place."""
        ...


class KeptNames:
    """The attributes of a module, a class, a function or an object."""

    def __init__(self, owner: Any, watched: set[str]) -> None:
        self.owner, self.watched, self.before = owner, watched, dict(_attributes(owner))

    def restore(self) -> None:
        for name, value in list(_attributes(self.owner).items()):
            before = self.before.get(name, ABSENT)
            if name.startswith("__") or value is before or not holds_numbers(value, self.watched):
                continue
            if before is ABSENT:
                _owner_of(self.owner).__delattr__(self.owner, name)
            else:
                _owner_of(self.owner).__setattr__(self.owner, name, before)


class KeptItems:
    """The items of a dict."""

    def __init__(self, owner: dict[Any, Any], watched: set[str]) -> None:
        self.owner, self.watched, self.before = owner, watched, dict(owner)

    def restore(self) -> None:
        for key, value in list(self.owner.items()):
            before = self.before.get(key, ABSENT)
            if value is before or not holds_numbers(value, self.watched):
                continue
            if before is ABSENT:
                del self.owner[key]
            else:
                self.owner[key] = before


class KeptElements:
    """The elements of a list, a set or a deque."""

    def __init__(self, owner: Any, watched: set[str]) -> None:
        self.owner, self.watched, self.before = owner, watched, list(owner)

    def restore(self) -> None:
        known = set(map(id, self.before))
        if any(id(value) not in known and holds_numbers(value, self.watched) for value in self.owner):
            self.owner.clear()
            (self.owner.update if isinstance(self.owner, set) else self.owner.extend)(self.before)


class KeptCell:
    """A variable that functions share."""

    def __init__(self, owner: Any, watched: set[str]) -> None:
        self.owner, self.watched, self.before = owner, watched, _content(owner)

    def restore(self) -> None:
        now = _content(self.owner)
        if now is self.before or not holds_numbers(now, self.watched):
            return
        if self.before is ABSENT:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = self.before


class KeptCache:
    """The results of a function of `functools.cache` or `lru_cache`."""

    def __init__(self, owner: Any, watched: set[str]) -> None:
        self.owner, self.watched, self.before = owner, watched, owner.cache_info().misses

    def restore(self) -> None:
        if self.owner.cache_info().misses != self.before and holds_numbers(_results(self.owner), self.watched):
            self.owner.cache_clear()


def list_kept(value: Any, watched: set[str], seen: set[int]) -> Iterator[Kept]:
    """Note what a module, and whatever of the `watched` packages it leads to, holds now."""
    waiting = [value]
    while waiting and len(seen) < REACHED:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (int, float, str, bytes, torch.Tensor)):
            continue
        if type(value) in CONTAINERS and len(value) > MOST:
            continue
        seen.add(id(value))
        own, inside = _noted(value, watched)
        yield from own
        waiting += inside


def _noted(value: Any, watched: set[str]) -> tuple[list[Kept], list[Any]]:
    """Return what is noted of one value, and the values that it leads to."""
    if isinstance(value, LRU):
        return [KeptCache(value, watched)], [value.__wrapped__]
    if isinstance(value, (staticmethod, classmethod, property)):
        return [], [getattr(value, name, None) for name in ("__func__", "fget", "fset")]
    if type(value) in CONTAINERS:
        return _noted_container(value, watched)
    owner = value.__name__ if isinstance(value, ModuleType) else _module_of(value)
    attributes = _attributes(value)
    if not _is_watched(owner, watched) or attributes is None:
        return [], []
    cells, defaults = (value.__closure__, value.__defaults__) if isinstance(value, FunctionType) else ((), ())
    noted: list[Kept] = [KeptNames(value, watched), *(KeptCell(cell, watched) for cell in cells or ())]
    return noted, [*attributes.values(), *map(_content, cells or ()), *(defaults or ())]


def _noted_container(value: Any, watched: set[str]) -> tuple[list[Kept], list[Any]]:
    if isinstance(value, dict):
        return [KeptItems(value, watched)], list(value.values())
    fixed = isinstance(value, (tuple, frozenset))
    return [] if fixed else [KeptElements(value, watched)], list(value)


def holds_numbers(value: Any, watched: set[str], seen: frozenset[int] = frozenset()) -> bool:
    """Return True where a value is or contains a tensor or a number, which may have come from a fake one."""
    if isinstance(value, NAMELESS) or id(value) in seen:
        return False
    if isinstance(value, (int, float, complex, torch.Tensor)) or type(value).__module__ == "numpy":
        return True
    seen = seen | {id(value)}
    if isinstance(value, dict):
        return any(holds_numbers(v, watched, seen) for pair in dict.items(value) for v in pair)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return any(holds_numbers(v, watched, seen) for v in value)
    if isinstance(value, nn.Module) or _is_watched(type(value).__module__, watched):
        return any(holds_numbers(v, watched, seen) for v in (_attributes(value) or {}).values())
    return False


def _results(cached: Any) -> list[Any]:
    """Return the results that a cached function keeps, without their keys."""
    inside = [referent for referent in gc.get_referents(cached) if referent is not vars(cached)]
    keys = {id(key) for referent in inside if type(referent) is dict for key in referent}
    values = [value for referent in inside if type(referent) is dict for value in referent.values()]
    return [referent for referent in (*inside, *values) if type(referent) is not dict and id(referent) not in keys]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the container is empty
        return ABSENT


def _attributes(value: Any) -> Any:
    """Return the `__dict__` of a value, or None, without asking a `__getattr__` of its own.

    An object that answers for any name may do work for it: wandb's summary asks its service.
    """
    try:
        return (type if isinstance(value, type) else object).__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def _module_of(value: Any) -> str | None:
    """Return the module of a class or a function, or of an object's class."""
    module = value.__module__ if isinstance(value, (type, FunctionType)) else type(value).__module__
    return module if isinstance(module, str) else None


def _is_watched(module: str | None, watched: set[str]) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in watched


def _owner_of(owner: Any) -> Any:
    """Return the type whose plain `__setattr__` and `__delattr__` reach an owner's attributes."""
    return type if isinstance(owner, type) else object
