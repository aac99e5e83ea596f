"""One run in full: settings, parts, data, numbers, checkpoints, health, files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.runs.run_folder import CHECKPOINTS, RunFolder, reach_value

MANIFEST: Final = "manifest.json"  # a checkpoint without this file was never finished
ENVIRONMENT: Final = ("platform", "processor", "device", "threads")


def run_details(run: RunFolder) -> dict[str, Any]:
    """Return all that `luthier runs show` prints, as plain data."""
    record, settings = run.record, run.settings()
    return {
        **run.summary(),
        "updated": record.get("updated"),
        "error": record.get("error"),
        "stop_reason": run.result.get("stop_reason"),
        "recipe_hash": record.get("recipe_hash"),
        "settings": settings,
        "changed": None if settings is None else changed(settings),
        "parts": run.parts,
        "data": {"fingerprint": record.get("data"), "rows": (settings or {}).get("data")},
        "versions": record.get("versions"),
        "environment": {name: record.get(name) for name in ENVIRONMENT},
        "decisions": record.get("decisions"),
        "metrics": metric_ranges(run),
        "checkpoints": checkpoints(run.path),
        "health": record.get("health"),
        "files": files(run.path),
    }


def metric_ranges(run: RunFolder) -> dict[str, dict[str, float]]:
    """Return the first, last, least and greatest value of each metric; of a rate also the median."""
    return {name: value_range.to_dict() for name, value_range in run.survey.ranges.items()}


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Return the checkpoints, oldest first: name, bytes, and True if it was finished."""
    root = folder / CHECKPOINTS
    folders = sorted(path for path in root.glob("step-*") if path.is_dir()) if root.is_dir() else []
    return [{"name": path.name, "bytes": size(path), "finished": (path / MANIFEST).is_file()} for path in folders]


def files(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of the folder by name: files with their bytes, folders with the bytes of all files in them."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [{"name": name + "/" * (folder / name).is_dir(), "bytes": size(folder / name)} for name in names]


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder. A file that vanishes meanwhile counts 0."""
    if path.is_dir() and not path.is_symlink():
        return sum(size(inner) for inner in _inner(path))
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _inner(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def flatten_tree(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by their dotted paths.

    An empty mapping or list is a leaf, as is a list of scalars.
    """
    if isinstance(tree, Mapping) and tree:
        branches = {f"{path}.{name}" if path else str(name): inner for name, inner in tree.items()}
        return {k: v for name, inner in branches.items() for k, v in flatten_tree(inner, name).items()}
    if isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        return {k: v for place, inner in enumerate(tree) for k, v in flatten_tree(inner, f"{path}.{place}").items()}
    return {path: tree}


def changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from their defaults, by their dotted paths."""
    from luthier.recipe import Data, Model, Recipe, Source

    known = {**_defaults(Recipe, ""), **_defaults(Model, "model."), **_defaults(Data, "data."), **_of_parts(settings)}
    sources = _defaults(Source, "")
    changes = {}
    for path, value in flatten_tree(settings).items():
        source = path.startswith(("data.train.", "data.validation."))
        default = sources.get(path.split(".", 3)[-1]) if source else known.get(path)
        if json.dumps(value) != json.dumps(default):
            changes[path] = value
    return changes


def _defaults(cls: type, prefix: str) -> dict[str, Any]:
    from luthier.recipe.parts import default_options

    return flatten_tree({prefix + name: value for name, value in default_options(cls).items()})


def _of_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default part of each field, and the default options of the part that the settings name."""
    from luthier.recipe.parts import FIELDS
    from luthier.recipe.reading.draft import default_of

    options: dict[str, Any] = {}
    for kind in FIELDS:
        options |= {f"{kind}.name": default_of(kind), **_of_part(kind, settings.get(kind), kind)}
    options |= {f"exact_callbacks.{place}.name": name for place, name in enumerate(default_of("callbacks"))}
    for place, value in enumerate(settings.get("exact_callbacks") or ()):
        options |= _of_part("callback", value, f"exact_callbacks.{place}")
    return options


def _of_part(kind: str, value: Any, path: str) -> dict[str, Any]:
    """Return the default options of a part by their paths; an empty dict if the part is not installed here."""
    from luthier.errors import LuthierError
    from luthier.plugins.registry import installed_plugins

    try:
        options = installed_plugins().options(installed_plugins().get(kind, str(reach_value(value, "name"))))
    except LuthierError:
        return {}
    return _defaults(options, f"{path}.")
