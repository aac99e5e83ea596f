"""The comparison of two runs: options, parts, data, versions, numbers, and a picture of both curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.runs.details import ENVIRONMENT, flatten_tree, metric_ranges
from luthier.runs.metric_survey import DRAWN
from luthier.runs.run_folder import RunFolder

APART: Final = ("output_dir",)  # an option that differs between any two runs


def compare_runs(a: RunFolder, b: RunFolder) -> dict[str, Any]:
    """Return all that `luthier runs diff` prints, as plain data. Each difference has the values of `a` and of `b`."""
    return {
        "a": a.summary(),
        "b": b.summary(),
        "recipe_hash": _pair(a.record.get("recipe_hash"), b.record.get("recipe_hash")),
        "options": _options(a, b),
        "parts": _differences(_parts(a), _parts(b)),
        "data": _pair(a.record.get("data"), b.record.get("data")),
        "versions": _differences(_mapping(a, "versions"), _mapping(b, "versions")),
        "environment": _differences(*({n: run.record.get(n) for n in ENVIRONMENT} for run in (a, b))),
        "metrics": _numbers(a, b),
    }


def _options(a: RunFolder, b: RunFolder) -> list[dict[str, Any]]:
    trees = [run.settings() for run in (a, b)]
    lacking = [run for run, tree in zip((a, b), trees, strict=True) if tree is None]
    if lacking:
        problem = "its recipe.yaml is missing or damaged"
        raise LuthierError("run-not-found", problem, where=str(lacking[0].path), remedy="Compare other runs.")
    one, other = (flatten_tree(tree) for tree in trees)
    return [difference for difference in _differences(one, other) if difference["name"] not in APART]


def _parts(run: RunFolder) -> dict[str, str]:
    """Return each part as text with its version, by kind (callbacks: by kind and name)."""
    differences = {}
    for part in run.parts:
        kind, name = str(part.get("kind")), str(part.get("name"))
        key = f"{kind} {name}" if kind == "callback" else kind
        differences[key] = f"{name} {part.get('version') or 'of a program'}"
    return differences


def _mapping(run: RunFolder, name: str) -> Mapping[str, Any]:
    value = run.record.get(name)
    return value if isinstance(value, dict) else {}


def _numbers(a: RunFolder, b: RunFolder) -> list[dict[str, Any]]:
    """Return the last value of each metric that either run has; for a rate, the median."""
    with ThreadPoolExecutor(2) as readers:  # long files are parsed outside the interpreter's lock
        one, other = readers.map(_last_values, (a, b))
    return [
        {"name": name, **_pair(one.get(name), other.get(name)), "difference": _minus(one.get(name), other.get(name))}
        for name in _names(one, other)
    ]


def _last_values(run: RunFolder) -> dict[str, float | None]:
    values = {name: summary.get("median", summary["last"]) for name, summary in metric_ranges(run).items()}
    return {**values, "steps": run.step}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else b - a


def _pair(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b, "same": a == b}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": n, "a": a.get(n), "b": b.get(n)} for n in _names(a, b) if a.get(n) != b.get(n)]


def _names(*mappings: Iterable[str]) -> list[str]:
    """Return the names of all mappings without repetition, in order of first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def draw_both(a: RunFolder, b: RunFolder, path: Path) -> Path:
    """Draw the losses of both runs as a PNG. Raises `path-unwritable`, and `run-not-found` if neither has any."""
    from luthier.errors import unwritable_path
    from luthier.runs.picture import draw_picture

    names = [run.name if a.name != b.name else run.run_id or str(run.path) for run in (a, b)]
    points = {
        f"{who} {name}": run.survey.series(name) for run, who in zip((a, b), names, strict=True) for name in DRAWN
    }
    curves = {name: series for name, series in points.items() if series}
    if not curves:
        remedy = "Run with callbacks: [jsonl], which is the default."
        raise LuthierError("run-not-found", "neither run has metrics to draw", where=str(a.path), remedy=remedy)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(curves, path, title=" and ".join(names))
    except OSError as error:
        raise unwritable_path(path, error) from None
    return path
