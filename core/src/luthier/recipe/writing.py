"""A recipe as plain data, as YAML, and as a hash of everything that determines the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.plugins.registry import Plugins, installed_plugins
from luthier.recipe.parts import FIELDS, LISTS, is_absent, part_identity, plain_entry, plain_value, to_plain
from luthier.recipe.reading.paths import escape_variables, locate_paths
from luthier.recipe.schema import Settings

WATCHING: Final = (
    *("output_dir", "run_name", "callbacks", "exact_callbacks", "logging_steps", "gradient_flow_steps"),
    *("distributed", "oom_recovery", "memory_check"),
    *("save_strategy", "save_steps", "save_samples", "save_total_limit", "save_final", "async_save"),
)
WATCHING_DATA: Final = ("num_proc", "cache")  # how rows are prepared, which does not change the rows


def plain_recipe(recipe: Settings, plugins: Plugins | None = None) -> dict[str, Any]:
    """Return the resolved recipe: every setting, and every part as `{name: ..., every option}`."""
    known = plugins or installed_plugins()
    result: dict[str, Any] = {}
    for field in attrs.fields(Settings):
        value = getattr(recipe, field.name)
        if field.name in FIELDS and not is_absent(field.name, value):
            result[field.name] = to_plain(value, field.name, field.name, known)
        elif field.name == "callbacks":
            result["exact_callbacks"] = [to_plain(c, "callback", f"callbacks.{i}", known) for i, c in enumerate(value)]
        elif field.name in LISTS:
            kind = LISTS[field.name]
            result[field.name] = [plain_entry(e, kind, f"{field.name}.{i}", known) for i, e in enumerate(value)]
        else:
            result[field.name] = plain_value(value)
    return escape_variables(result)


def same_run(one: Settings, other: Settings, plugins: Plugins | None = None) -> bool:
    """Return True if two recipes mean the same run: equal settings, the same parts with the same options."""
    known = plugins or installed_plugins()
    return all(_field(one, f.name, known) == _field(other, f.name, known) for f in attrs.fields(Settings))


def recipe_hash(recipe: Settings, plugins: Plugins | None = None) -> str:
    """Return 16 hexadecimal digits, a hash of everything that determines the run."""
    return hashlib.sha256(json.dumps(determining_settings(recipe, plugins), sort_keys=True).encode()).hexdigest()[:16]


def determining_settings(recipe: Settings, plugins: Plugins | None = None) -> dict[str, Any]:
    """Return the settings that determine a run, as plain data.

    Relative paths count as the absolute paths that they mean, so that the written recipe gives the same settings.
    """
    return without_watching(plain_recipe(locate_paths(recipe), plugins))


def without_watching(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's plain data without the settings that only watch or name the run."""
    determining = {k: v for k, v in settings.items() if k not in WATCHING}
    return {**determining, "data": {k: v for k, v in settings["data"].items() if k not in WATCHING_DATA}}


def write_recipe(recipe: Settings, path: str | Path, plugins: Plugins | None = None) -> None:
    """Write the resolved recipe as YAML that `Recipe.load` reads back equal, its relative paths made absolute."""
    from luthier.recipe.reading.yaml12 import dump_yaml

    Path(path).write_text(dump_yaml(plain_recipe(locate_paths(recipe), plugins)), "utf-8")


def _field(recipe: Settings, name: str, plugins: Plugins) -> Any:
    value = getattr(recipe, name)
    if name in FIELDS:
        return part_identity(value, name, plugins)
    return [part_identity(c, "callback", plugins) for c in value] if name == "callbacks" else value
