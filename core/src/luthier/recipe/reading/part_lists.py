"""Settings that are lists of parts: names and mappings stay as they are written, objects in Python are read here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.plugins.registry import Plugins
from luthier.plugins.structure import Written, structure_value
from luthier.recipe.parts import LISTS, default_options, find_part, plain_options
from luthier.recipe.reading.draft import default_of
from luthier.recipe.reading.paths import escape_variables

PLAIN = (str, Mapping, Written, bool, int, float, list, tuple, type(None))


def read_parts(tree: Mapping[str, Any], name: str, plugins: Plugins) -> list[Any]:
    """Return the list of a recipe's tree: names and mappings, which are looked up later, and objects of the caller.

    An options object becomes a mapping. Raises `LuthierError` at the entry that is wrong.
    """
    given = tree.get(name, default_of(name))
    if not isinstance(given, (list, tuple)):
        structured: list[Any] = structure_value(given, list[str | dict[str, Any]], name)
        return structured
    return [_read_entry(entry, LISTS[name], f"{name}.{i}", plugins) for i, entry in enumerate(given)]


def given_parts(values: list[Any], name: str, plugins: Plugins) -> list[Any]:
    """Return the entries of a recipe's list as its tree has them; see `brief_part`."""
    entries = enumerate(values)
    return [
        escape_variables(entry) if isinstance(entry, (str, Mapping))
        else brief_part(entry, LISTS[name], f"{name}.{i}", plugins)
        for i, entry in entries
    ]  # fmt: skip


def brief_part(value: Any, kind: str, where: str, plugins: Plugins) -> Any:
    """Return a part as its name and the options that are not defaults; an object of the caller unchanged."""
    part = find_part(value, kind, where, plugins)
    if part.local is not None:
        return part.local
    changed = {n: v for n, v in plain_options(part.options).items() if v != default_options(type(part.options)).get(n)}
    return escape_variables({"name": part.name, **changed})


def _read_entry(entry: Any, kind: str, where: str, plugins: Plugins) -> Any:
    if isinstance(entry, PLAIN):
        return structure_value(entry, str | dict[str, Any], where)
    part = find_part(entry, kind, where, plugins)
    return part.local if part.local is not None else part.to_plain()
