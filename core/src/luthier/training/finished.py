"""A finished run, given back as the result that it had, without torch being imported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.runs.writing.record import read_record
from luthier.runs.writing.target import find_place
from luthier.training.run import Run

Given = tuple[Recipe, Objects]
PATHS: Final = ("output_path", "artifact", "merged", "best_checkpoint")
log = get_logger()


def find_finished(recipe: Recipe) -> Run | None:
    """Return the run that a recipe without objects from Python has finished already, or None."""
    try:
        place = find_place(recipe, Objects(), fresh=False)
    except LuthierError:  # told by the run, after what is wrong with the recipe itself
        return None
    return tell_finished(place.folder, (recipe, Objects()), place.record) if place.done else None


def tell_finished(folder: Path, given: Given | None, record: dict[str, Any] | None) -> Run:
    """Say that a run is finished already, and return the result that it recorded.

    `given` is what its caller has in hand that no file could hold; `record` is what rank 0 has read.
    """
    log.warning("run already finished", folder=str(folder), remedy="--fresh trains again")
    return Run(**recorded_result(folder, record), given=given)


def recorded_result(folder: Path, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of `Run` that a completed run recorded; `record` None: read from the folder."""
    record = record or read_record(folder)
    if record is None or "result" not in record:
        raise LuthierError("run-not-found", "no finished run here", where=str(folder))
    fields: dict[str, Any] = {
        name: Path(value) if name in PATHS and value else value for name, value in record["result"].items()
    }
    numbers = (fields["final_loss"], *fields["loss_history"])  # null stands for the loss of a skipped step
    fields["final_loss"], *fields["loss_history"] = (math.nan if loss is None else loss for loss in numbers)
    return fields
