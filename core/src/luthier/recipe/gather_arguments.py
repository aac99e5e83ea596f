"""Gathering: what a caller in Python gives, as a recipe and the objects that no recipe can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.recipe.objects import Objects
from luthier.recipe.recipe import Recipe, load_recipe


def gather_arguments(
    recipe: Any, model: Any, tokenizer: Any, data: Any, eval_data: Any, settings: Mapping[str, Any]
) -> tuple[Recipe, Objects]:
    """The recipe that these arguments mean, and the objects that it cannot hold."""
    if isinstance(model, tuple):
        model, tokenizer = model
    changes = dict(settings)
    held: dict[str, Any] = {"tokenizer": tokenizer}
    for name, value, where in (
        ("model", model, "model"),
        ("data", data, "data"),
        ("eval_data", eval_data, "data.validation"),
    ):
        if value is None:
            continue
        if _is_named(value):
            changes[where] = str(value) if isinstance(value, Path) else value
        else:
            held[name] = value
            changes[where] = [_name_of(value)] if name == "eval_data" else _name_of(value)
    if held.get("model") is not None and tokenizer is None:
        remedy = "Pass tokenizer=, or model=(model, tokenizer)."
        raise LuthierError("recipe-missing", "a loaded model comes with its tokenizer", where="model", remedy=remedy)
    return _recipe(recipe, changes), Objects(**held)


def _recipe(recipe: Any, changes: dict[str, Any]) -> Recipe:
    """The recipe with the changes over it; the objects in it stay objects, and aliases are told in the log."""
    reading = load_recipe({} if recipe is None else recipe, changes)
    for note in reading.notes:
        get_logger().info("recipe", note=note)
    return reading.recipe


def _is_named(value: Any) -> bool:
    """Whether a recipe can hold it: a name, a path, a mapping of settings, or sources."""
    if isinstance(value, (str, Path, float)):
        return True
    if isinstance(value, Mapping):
        return not hasattr(value, "column_names")  # as a DatasetDict has
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, str) or _is_source(v) for v in value)


def _is_source(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" in value and set(value) <= {
        "path", "split", "name", "revision", "columns", "template", "max_rows",
    }  # fmt: skip


def _name_of(value: Any) -> str:
    """How the recipe of a run names an object of the caller's."""
    own = getattr(getattr(value, "config", None), "_name_or_path", "")
    return own or f"python:{type(value).__name__}"
