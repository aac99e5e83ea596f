"""Replaying: the recipe of an earlier run, with or without changes, for a fresh folder beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from luthier.errors import LuthierError
from luthier.runs.details import flatten_tree
from luthier.runs.metrics_file import finite_number
from luthier.runs.run_folder import RECIPE, RunFolder, free_folder

if TYPE_CHECKING:
    from luthier.recipe import Recipe

GIVEN = "python:"  # the prefix by which a recipe names what was passed in Python


@attrs.frozen(kw_only=True)
class Replay:
    """A recipe to train again, and how it differs from the run's recipe."""

    recipe: Recipe
    folder: Path
    changes: list[dict[str, Any]]
    was: str  # the hash of the run's recipe
    now: str
    processes: int = 1  # the number of processes of the run; a replay has one

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder),
            "changes": self.changes,
            "processes": {"was": self.processes, "now": 1},
            "recipe_hash": {"was": self.was, "now": self.now, "same": self.was == self.now},
        }


def replay_run(run: RunFolder, sets: Iterable[str] = (), output_dir: Path | None = None) -> Replay:
    """Return the recipe of a run, for training again. Environment variables are ignored, so that the recipe is the
    run's.

    Raises `run-not-found` if the folder has no whole recipe, and `data-not-found` or `model-not-found` for what was
    passed in Python and so is in no file.
    """
    from luthier.recipe import Recipe, recipe_hash

    settings = run.settings()
    if settings is None:
        problem = f"its {RECIPE} is missing or damaged"
        raise LuthierError("run-not-found", problem, where=str(run.path), remedy="Replay another run.")
    folder = free_folder(output_dir or run.path)
    sets = list(sets)
    recipe = Recipe.load(run.path / RECIPE, [*sets, f"output_dir={folder}"], environ={})
    _refuse_objects(recipe)
    changes = _changes(
        flatten_tree(settings), flatten_tree(recipe.to_dict()), [text.partition("=")[0] for text in sets]
    )
    was = str(run.record.get("recipe_hash"))
    processes = int(finite_number(run.record, "world_size") or 1)
    return Replay(recipe=recipe, folder=folder, changes=changes, was=was, now=recipe_hash(recipe), processes=processes)


def _changes(was: dict[str, Any], now: dict[str, Any], given: list[str]) -> list[dict[str, Any]]:
    """Return the options that differ. An option that is younger than the run is no change if nobody set it."""
    younger = [name for name in now if name not in was and not any(f"{name}.".startswith(f"{g}.") for g in given)]
    names = [name for name in dict.fromkeys([*was, *now]) if name != "output_dir" and name not in younger]
    return [{"name": n, "was": was.get(n), "now": now.get(n)} for n in names if was.get(n) != now.get(n)]


def _refuse_objects(recipe: Recipe) -> None:
    """Raise if the recipe names an object that the caller passed in Python, because no file holds it."""
    if recipe.model.name_or_path.startswith(GIVEN):
        remedy = "Give a model by --set model=NAME."
        raise LuthierError("model-not-found", "it was passed as a Python object", where="model", remedy=remedy)
    for where in ("train", "validation"):
        sources = getattr(recipe.data, where)
        if isinstance(sources, list) and any(source.path.startswith(GIVEN) for source in sources):
            remedy = f"Give them with --set data.{where}=PATH."
            problem = "the rows were passed as Python objects, and no file holds them"
            raise LuthierError("data-not-found", problem, where=f"data.{where}", remedy=remedy)
