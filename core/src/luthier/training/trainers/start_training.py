"""The start of a run: by Luthier's own loop, or by the trainer that its recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.data.first_look import check_first_rows
from luthier.errors import LuthierError
from luthier.runs.writing.differences import read_allowed
from luthier.training.train_run import train
from luthier.training.trainers.trainer_run import train_elsewhere

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.recipe.objects import Objects
    from luthier.training.run import Run


def start_training(
    recipe: Recipe,
    objects: Objects,
    resume: str | Path | None,
    allow_changed: str | Sequence[str],
    *,
    fresh: bool,
    re_decide: bool,
) -> Run:
    """Train to the end, and return the run; see `luthier.train`."""
    checkpoint, allowed = None if resume is None else Path(resume), read_allowed(allow_changed)
    if recipe.trainer is not None:
        return train_elsewhere(recipe, objects, resume=checkpoint, fresh=fresh)
    try:
        return train(recipe, objects, resume=checkpoint, fresh=fresh, re_decide=re_decide, allowed=allowed)
    except LuthierError as error:
        if error.code == "run-folder-other" and objects.data is None:
            # rows that the loss does not take are the likelier mistake, and a new folder would not mend it
            check_first_rows(recipe)
        raise
