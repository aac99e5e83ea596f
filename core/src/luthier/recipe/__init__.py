"""Recipes: the run's settings as data, read from files, flags, environment or Python. Imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from luthier.recipe.schema import Data, Model, Source

_HOME = {
    "Part": "luthier.recipe.parts",
    "Resolved": "luthier.recipe.parts",
    "resolve_parts": "luthier.recipe.parts",
    "Reading": "luthier.recipe.reading.read_recipe",
    "Recipe": "luthier.recipe.recipe",
    "load_recipe": "luthier.recipe.recipe",
    "from_mapping": "luthier.recipe.recipe",
    "parse_flags": "luthier.recipe.reading.overrides",
    "parse_sets": "luthier.recipe.reading.overrides",
    "recipe_hash": "luthier.recipe.writing",
}
__all__ = [
    "Data",
    "Model",
    "Part",
    "Reading",
    "Recipe",
    "Resolved",
    "Source",
    "from_mapping",
    "parse_flags",
    "parse_sets",
    "load_recipe",
    "recipe_hash",
    "resolve_parts",
]

if TYPE_CHECKING:
    from luthier.recipe.parts import Part, Resolved, resolve_parts
    from luthier.recipe.reading.overrides import parse_flags, parse_sets
    from luthier.recipe.reading.read_recipe import Reading
    from luthier.recipe.recipe import Recipe, from_mapping, load_recipe
    from luthier.recipe.writing import recipe_hash


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier.recipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
