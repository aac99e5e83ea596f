"""The gathering of arguments: what a caller passes in Python becomes a recipe, and objects that no recipe can hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.recipe.objects import Objects
from luthier.recipe.reading.read_recipe import Reading
from luthier.recipe.reading.shorthand import OF_A_SOURCE
from luthier.recipe.recipe import Recipe, load_recipe
from luthier.recipe.schema import Data, Model

SETTINGS = tuple(attrs.fields_dict(Data))  # names in a mapping that is no rows


def gather_arguments(
    recipe: Any, model: Any, tokenizer: Any, data: Any, eval_data: Any, settings: Mapping[str, Any]
) -> tuple[Recipe, Objects]:
    """Return the recipe that these arguments mean, and the objects that it cannot hold."""
    reading, objects = read_arguments(recipe, model, tokenizer, data, eval_data, settings)
    return reading.recipe, objects


def read_arguments(
    recipe: Any, model: Any, tokenizer: Any, data: Any, eval_data: Any, settings: Mapping[str, Any]
) -> tuple[Reading[Recipe], Objects]:
    """Return what `gather_arguments` does, the recipe together with what was written of it.

    A `Recipe` has every default written, so that its loss counts as written only if it is not the default.
    """
    if isinstance(model, tuple):
        model, tokenizer = model
    changes = dict(settings)
    given_objects: dict[str, Any] = {"tokenizer": _tokenizer(tokenizer, changes)}
    for name, value, where in (
        ("model", model, "model"),
        ("data", data, "data"),
        ("eval_data", eval_data, "data.validation"),
    ):
        if value is None:
            continue
        if where in changes:
            raise _second(where, name, changes[where])
        if _is_named(value):
            changes[where] = str(value) if isinstance(value, Path) else value
        else:
            given_objects[name] = value
            changes[where] = [_name_of(value)] if name == "eval_data" else _name_of(value)
    if given_objects.get("model") is not None and tokenizer is None and "model.tokenizer" not in changes:
        remedy = "Pass tokenizer=, or model=(model, tokenizer)."
        raise LuthierError("recipe-missing", "a loaded model needs its tokenizer", where="model", remedy=remedy)
    objects = Objects(**given_objects)
    return _read(recipe, changes, objects), objects


def _read(recipe: Any, changes: dict[str, Any], objects: Objects) -> Reading[Recipe]:
    """Return what the recipe with the changes over it means. Notes go to the log."""
    reading = load_recipe({} if recipe is None else recipe, changes)
    for note in reading.notes:
        get_logger().info("recipe", note=note)
    reading = attrs.evolve(reading, recipe=_without_unread(reading, objects))
    return _without_default(reading) if isinstance(recipe, Recipe) else reading


def _without_default(reading: Reading[Recipe]) -> Reading[Recipe]:
    loss = {name: value for name, value in reading.given.items() if name.partition(".")[0] == "loss"}
    if loss != {"loss.name": "sft"} or "loss.name" in reading.over:
        return reading
    return attrs.evolve(reading, given={name: value for name, value in reading.given.items() if name not in loss})


def _tokenizer(given: Any, changes: dict[str, Any]) -> Any:
    """Return the tokenizer if it is an object, else None; a name goes into `changes` as `model.tokenizer`."""
    if isinstance(given, (str, Path)):
        if "model.tokenizer" in changes:
            raise _second("model.tokenizer", "tokenizer", changes["model.tokenizer"])
        changes["model.tokenizer"] = str(given)
        return None
    if given is not None and not (callable(given) and hasattr(given, "decode")):
        problem, remedy = "not a tokenizer of transformers", "Pass one, or the name or folder of one."
        raise LuthierError("recipe-wrong-type", problem, where="tokenizer", found=given, remedy=remedy)
    return given


def _second(where: str, name: str, value: Any) -> LuthierError:
    return LuthierError("recipe-conflict", f"{name} is given too", where=where, found=value,
                        remedy="Keep one of the two.")  # fmt: skip


def _without_unread(reading: Reading[Recipe], objects: Objects) -> Recipe:
    """Return the recipe without the settings that the caller's objects replace.

    Raises `recipe-conflict` if the same call gives both. A setting that only the recipe has is dropped with a log line.
    """
    unread = {"model.dtype": "model", "model.revision": "model"} if objects.model is not None else {}
    unread |= {"model.tokenizer": "tokenizer"} if objects.tokenizer is not None else {}
    recipe = reading.recipe
    for name, keyword in unread.items():
        field = name.partition(".")[2]
        value, default = getattr(recipe.model, field), getattr(attrs.fields(Model), field).default
        if name not in reading.given:
            continue
        if name in reading.over:
            raise _second(name, f"nothing reads it: a loaded {keyword}", value)
        get_logger().info("recipe", note=f"{name} is dropped: a loaded {keyword} is given")
        changes = dict([(field, default)])
        recipe = attrs.evolve(recipe, model=attrs.evolve(recipe.model, **changes))
    return recipe


def _is_named(value: Any) -> bool:
    """Return True if a recipe can hold the value: a name, a path, a mapping of settings, or sources."""
    if isinstance(value, (str, Path, float)):
        return True
    if isinstance(value, Mapping):
        columns = value and all(isinstance(v, (list, tuple)) for v in value.values()) and not {*value} & {*SETTINGS}
        return not (columns or hasattr(value, "column_names"))  # a DatasetDict has this attribute, and is rows
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, str) or _is_source(v) for v in value)


def _is_source(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" in value and set(value) <= {*OF_A_SOURCE}


def _name_of(value: Any) -> str:
    """Return the name by which a run's recipe refers to an object of the caller."""
    own = getattr(getattr(value, "config", None), "_name_or_path", "")
    return own or f"python:{type(value).__name__}"
