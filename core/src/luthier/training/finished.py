"""A finished run, given back as the result that it had, without torch being imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.runs.recorded_result import recorded_result
from luthier.runs.writing.target import find_place
from luthier.training.run import Run

log = get_logger()


def find_finished(recipe: Recipe) -> Run | None:
    """Return the run that a recipe without objects from Python has finished already, or None.

    Raises `run-folder-other` for a folder that is another run's.
    """
    try:
        place = find_place(recipe, Objects(), fresh=False)
    except LuthierError as error:
        if error.code == "run-folder-other":
            raise
        return None  # told by the run, after what is wrong with the recipe itself
    return tell_finished(place.folder, (recipe, Objects()), place.record) if place.done else None


def tell_finished(folder: Path, given: tuple[Recipe, Objects] | None, record: dict[str, Any] | None) -> Run:
    """Say that a run is finished already, and return the result that it recorded.

    `given` is what its caller has in hand that no file could hold; `record` is what rank 0 has read.
    """
    log.warning("run already finished", folder=str(folder), remedy="--fresh trains again")
    return Run(**recorded_result(folder, record), given=given)
