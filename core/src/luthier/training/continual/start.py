"""Start of a continual run: its tasks from a recipe, then the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.recipe import Recipe, load_recipe
from luthier.recipe.objects import Objects
from luthier.training.continual.forgetting_report import TaskReport
from luthier.training.continual.sequence import train_tasks
from luthier.training.continual.slices import cut_rows, with_rows
from luthier.training.continual.tasks import Task, TaskSequence, folder_name, make_tasks, read_sequence

FOLDER: Final = "runs/continual"
ROWS: Final = "data"  # the folder of the rows' slices


def train_sequence(
    source: str | Path | Mapping[str, Any] | None,
    overrides: Any,
    own: Mapping[str, Any],
    output_dir: str | Path | None,
    allowed: frozenset[str] = frozenset(),
) -> TaskReport:
    """Read the tasks of a recipe and train them; `own` are settings of the sequence that win over the recipe's.

    `allowed` names what may differ from what a task began with.
    Raises `recipe-wrong-type` where the model is an object: each task begins from the named base.
    """
    tree, base, sequence, rest = read_sequence(source, overrides, own)
    if not isinstance(tree.get("model", ""), (str, Mapping)):
        remedy = "Save it to a folder, and give the folder's name."
        raise LuthierError("recipe-wrong-type", "tasks begin from a base by its name", where="model", remedy=remedy)
    folder = _folder_of(tree, base, output_dir)
    if sequence.tasks:
        tasks = make_tasks(tree, base, sequence.tasks, rest, folder)
    else:
        shared = {name: value for name, value in tree.items() if name != "output_dir"}
        tasks = _sliced(load_recipe(shared or None, rest, base=base).recipe, sequence, folder)
    return train_tasks(tasks, folder, Objects(), eval_base=sequence.eval_base, allowed=allowed)


def _folder_of(tree: Mapping[str, Any], base: Path | None, output_dir: str | Path | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    named = Path(str(tree.get("output_dir", FOLDER)))
    return named if base is None or "output_dir" not in tree else base / named


def _sliced(recipe: Recipe, sequence: TaskSequence, folder: Path) -> list[Task]:
    files = cut_rows(recipe, sequence.num_runs or 1, sequence.samples_per_run, folder / ROWS)
    tasks = []
    for number, file in enumerate(files):
        name = f"run-{number:02d}"
        own = attrs.evolve(
            with_rows(recipe, file, sequence.steps_per_run), output_dir=str(folder / folder_name(number, name))
        )
        tasks.append(Task(name=name, recipe=own))
    return tasks
