"""Slices: one data set cut into the rows of several runs, each in a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from luthier.data.source_shares import are_plain
from luthier.data.stream.source_rows import make_supplies
from luthier.disk import sync_path
from luthier.errors import LuthierError
from luthier.recipe import Recipe


def cut_rows(recipe: Recipe, num_runs: int, samples_per_run: int | None, folder: Path) -> list[Path]:
    """Write the rows of each run, drawn without overlap from a shuffle by the recipe's seed, and return the files.

    Columns are mapped already in what is written. Files that are there stay: the same seed cuts the same rows. Raises
    `data-empty` where the rows do not suffice.
    """
    if not are_plain(recipe.data.train):
        problem = "the rows of several runs are cut without overlap: no share, repeat or weight"
        remedy = "Leave them out."
        raise LuthierError("recipe-conflict", problem, where="data.train", remedy=remedy)
    rows = [row.whole.values for supply in _sources(recipe) for row in supply.rows]
    size = samples_per_run or len(rows) // num_runs
    if size == 0 or size * num_runs > len(rows):
        problem = f"{num_runs} runs of {samples_per_run or 1} rows each want more than there are"
        raise LuthierError("data-empty", problem, where="samples_per_run", found=len(rows), remedy="Lower one of them.")
    order = np.random.default_rng(recipe.seed).permutation(len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [sorted(order[number * size :][:size].tolist()) for number in range(num_runs)]
    places = [slice_path(folder, number) for number in range(num_runs)]
    return [_write_rows(path, [rows[i] for i in own]) for path, own in zip(places, chosen, strict=True)]


def slice_path(folder: Path, number: int) -> Path:
    """Return the file of a run's rows."""
    return folder / f"{slice_name(number)}.jsonl"


def slice_name(number: int) -> str:
    """Return the name of a run, and of the file of its rows."""
    return f"run-{number:02d}"


def _sources(recipe: Recipe) -> Sequence[Any]:
    return make_supplies(recipe.data.train, None, "data", recipe.data.text_unit, telling=False)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.is_file() and path.read_text("utf-8") == text:
        return path
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, "utf-8")
    sync_path(aside)
    os.replace(aside, path)
    return path


def with_rows(recipe: Recipe, path: Path, max_steps: int | None) -> Recipe:
    """Return the recipe with a slice in the place of its rows, and its number of steps where one is given."""
    source = attrs.evolve(recipe.data.train[0], path=str(path), columns={}, template={}, max_rows=None, name=None)
    recipe = attrs.evolve(recipe, data=attrs.evolve(recipe.data, train=[source]))
    return recipe if max_steps is None else attrs.evolve(recipe, max_steps=max_steps)
