"""The two ways to choose callbacks: `callbacks` adds to the defaults, `exact_callbacks` is the whole list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.registry import Plugins
from luthier.plugins.structure import Written, place_error, wrong_value
from luthier.recipe.parts import Part, find_part
from luthier.recipe.reading.draft import Steps, default_of

ADDED, EXACT = "callbacks", "exact_callbacks"


def read_callbacks(tree: Mapping[str, Any], plugins: Plugins) -> list[tuple[Steps, Part]]:
    """Return the callbacks that a recipe's tree means, in order, each with the path at which it was written.

    `callbacks` adds to the defaults: an entry with a default's name replaces that default, with its own options, and
    `"-plot"` removes one. An empty list, or `none`, means no callback at all. `exact_callbacks` holds the whole list
    and adds nothing; written recipes use it. Raises `LuthierError` at the entry that is wrong.
    """
    name = EXACT if EXACT in tree else ADDED
    given = tree.get(name, default_of(ADDED))
    if not isinstance(given, list):
        raise place_error(wrong_value(given, "a list"), name)
    texts = [_text_of(entry) for entry in given]
    if texts == ["none"]:
        return []
    removals = {} if name == EXACT else {i: text[1:] for i, text in enumerate(texts) if text.startswith("-")}
    listed: list[tuple[Steps, Part]] = [
        ((name, str(i)), find_part(entry, "callback", f"{name}.{i}", plugins))
        for i, entry in enumerate(given)
        if i not in removals
    ]
    return listed if name == EXACT or not given else _added_to_defaults(listed, removals, plugins)


def _added_to_defaults(
    listed: list[tuple[Steps, Part]], removals: Mapping[int, str], plugins: Plugins
) -> list[tuple[Steps, Part]]:
    defaults = default_of(ADDED)
    for i, name in removals.items():
        _check_removal(name, f"{ADDED}.{i}", defaults, {part.name for _, part in listed})
    result: list[tuple[Steps, Part]] = []
    for name in (name for name in defaults if name not in removals.values()):
        own = [pair for pair in listed if pair[1].name == name]
        result += own or [((ADDED,), find_part(name, "callback", ADDED, plugins))]
    return result + [pair for pair in listed if pair[1].name not in defaults]


def _text_of(entry: Any) -> str:
    return entry.text if isinstance(entry, Written) else entry if isinstance(entry, str) else ""


def _check_removal(name: str, where: str, defaults: list[str], listed: set[str]) -> None:
    """Raise `recipe-conflict` for the removal of something that is no default, or that the same list adds."""
    if name in listed:
        raise LuthierError("recipe-conflict", f"{name} is both listed and removed", where=where, found=f"-{name}")
    if name not in defaults:
        problem = f"'-' removes one of the default callbacks: {', '.join(defaults)}"
        raise LuthierError(
            "recipe-conflict", problem, where=where, found=f"-{name}", remedy=suggest_nearest(name, defaults)
        )
