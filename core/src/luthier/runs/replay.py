"""Replaying: the recipe of a run, with or without changes, for a fresh folder beside it."""

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

GIVEN = "python:"  # how a recipe names what was handed over in Python


@attrs.frozen(kw_only=True)
class Replay:
    """The recipe to train, and how it differs from the run's."""

    recipe: Recipe
    folder: Path
    changes: list[dict[str, Any]]
    was: str  # the hash of the run's recipe
    now: str
    processes: int = 1  # that the run had; a replay has one

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder),
            "changes": self.changes,
            "processes": {"was": self.processes, "now": 1},
            "recipe_hash": {"was": self.was, "now": self.now, "same": self.was == self.now},
        }


def replay_run(run: RunFolder, sets: Iterable[str] = (), output_dir: Path | None = None) -> Replay:
    """What to train again. The environment has no say, so that the recipe is the run's.

    Raises `run-not-found` where the folder has no whole recipe, and `data-not-found` or `model-not-found` for what
    was handed over in Python.
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
    """What differs. An option that is younger than the run is no change where nobody gave it."""
    younger = [name for name in now if name not in was and not any(f"{name}.".startswith(f"{g}.") for g in given)]
    names = [name for name in dict.fromkeys([*was, *now]) if name != "output_dir" and name not in younger]
    return [{"name": n, "was": was.get(n), "now": now.get(n)} for n in names if was.get(n) != now.get(n)]


def _refuse_objects(recipe: Recipe) -> None:
    """What was an object of the caller's is in no file."""
    if recipe.model.name_or_path.startswith(GIVEN):
        remedy = "Give a model by --set model=NAME."
        raise LuthierError("model-not-found", "it was handed over in Python", where="model", remedy=remedy)
    for where in ("train", "validation"):
        sources = getattr(recipe.data, where)
        if isinstance(sources, list) and any(source.path.startswith(GIVEN) for source in sources):
            remedy = f"Give them by --set data.{where}=PATH."
            problem = "the rows were handed over in Python, and no file holds them"
            raise LuthierError("data-not-found", problem, where=f"data.{where}", remedy=remedy)
