"""Start of a continual run: its tasks from a recipe, then the sequence, or its plan."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.data.formats.wanted import Wanted
from luthier.distributed.join import join_world
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.load import tokenizer_of
from luthier.recipe import Recipe, load_recipe, resolve_parts
from luthier.recipe.objects import Objects
from luthier.recipe.reading.read_recipe import Reading
from luthier.runs.run_folder import free_folder
from luthier.runs.writing.target import begun
from luthier.training.continual.forgetting_report import TaskReport
from luthier.training.continual.sequence import train_tasks
from luthier.training.continual.sequence_plan import SequencePlan, plan_tasks
from luthier.training.continual.slices import cut_rows, slice_name, slice_path, with_rows
from luthier.training.continual.tasks import (
    Task,
    TaskSequence,
    folder_name,
    make_tasks,
    place_tasks,
    read_sequence,
    relate_tasks,
)
from luthier.training.rows import prepared_data

FOLDER: Final = "runs/continual"
ROWS: Final = "data"  # the folder of the rows' slices
EMBEDDED: Final = "demo"
HELD_OUT: Final = 0.1  # the share of each run's rows on which the runs are compared
log = get_logger()


def train_sequence(
    source: str | Path | Mapping[str, Any] | None,
    overrides: Any,
    own: Mapping[str, Any],
    output_dir: str | Path | None,
    allowed: frozenset[str] = frozenset(),
    *,
    fresh: bool = False,
) -> TaskReport:
    """Read the tasks of a recipe and train them; `own` are settings of the sequence that win over the recipe's.

    `allowed` names what may differ from what a task began with. `fresh` takes a new folder beside an existing one.
    Raises `recipe-wrong-type` where the model is an object: each task begins from the named base.
    """
    asked = _read_asked(source, overrides, own, output_dir, fresh=fresh)
    folder, eval_base = asked.folder, asked.sequence.eval_base
    if asked.tasks:
        return train_tasks(place_tasks(asked.tasks, folder), folder, Objects(), eval_base=eval_base, allowed=allowed)
    with _told_as_written(asked.whole, folder):
        tasks = place_tasks(_sliced(asked.whole, asked.sequence, folder), folder)
        return train_tasks(tasks, folder, Objects(), eval_base=eval_base, allowed=allowed)


def plan_sequence(
    source: str | Path | Mapping[str, Any] | None,
    overrides: Any,
    own: Mapping[str, Any],
    output_dir: str | Path | None,
    allowed: frozenset[str] = frozenset(),
    *,
    fresh: bool = False,
) -> SequencePlan:
    """Return what `train_sequence` would do with these arguments. The rows of slices are cut into a folder for now."""
    asked = _read_asked(source, overrides, own, output_dir, fresh=fresh)
    folder, sequence = asked.folder, asked.sequence
    if asked.tasks:
        tasks = place_tasks(asked.tasks, folder)
        written = [task.recipe for task in tasks]
        return plan_tasks(tasks, folder, written, eval_base=sequence.eval_base, allowed=allowed)
    with tempfile.TemporaryDirectory() as aside, _told_as_written(asked.whole, Path(aside)):
        tasks = place_tasks(_sliced(asked.whole, sequence, Path(aside)), folder)
        paths = [slice_path(folder / ROWS, number) for number in range(len(tasks))]
        written = [with_rows(task.recipe, path, None) for task, path in zip(tasks, paths, strict=True)]
        return plan_tasks(tasks, folder, written, eval_base=sequence.eval_base, allowed=allowed)


@attrs.frozen(kw_only=True)
class _Asked:
    """A sequence as it was asked for: its tasks, or without any the recipe whose rows are cut into runs."""

    sequence: TaskSequence
    tasks: list[Task]
    whole: Recipe
    folder: Path


def _read_asked(source: Any, overrides: Any, own: Mapping[str, Any], output_dir: Any, *, fresh: bool) -> _Asked:
    """Return the sequence that was asked for; one without a recipe that names no model trains the embedded one."""
    try:
        return _read_named(source, overrides, own, output_dir, fresh=fresh)
    except LuthierError as error:
        if source is not None or (error.code, error.where) != ("recipe-missing", "model"):
            raise
    log.warning("the embedded model is trained", model=EMBEDDED, because="no model is named", remedy="give model")
    return _read_named({"model": EMBEDDED}, overrides, own, output_dir, fresh=fresh)


def _read_named(source: Any, overrides: Any, own: Mapping[str, Any], output_dir: Any, *, fresh: bool) -> _Asked:
    tree, base, sequence, rest = read_sequence(source, overrides, own)
    if not isinstance(tree.get("model", ""), (str, Mapping)):
        remedy = "Save it to a folder, and give the folder's name."
        raise LuthierError("recipe-wrong-type", "tasks begin from a base by its name", where="model", remedy=remedy)
    tasks = relate_tasks(make_tasks(tree, base, sequence.tasks, rest), sequence) if sequence.tasks else []
    shared = {name: value for name, value in tree.items() if name != "output_dir"}
    whole = tasks[0].recipe if tasks else _with_held_out(load_recipe(shared or None, rest, base=base))
    folder = _folder_of(tree, base, output_dir)
    folder = _fresh_folder(folder, whole, tasks[0].name if tasks else slice_name(0)) if fresh else folder
    return _Asked(sequence=sequence, tasks=tasks, whole=whole, folder=folder)


def _with_held_out(reading: Reading[Recipe]) -> Recipe:
    """Return a recipe whose rows are cut into runs with a share of them held out, unless it speaks of validation."""
    if "data.validation" in reading.given:
        return reading.recipe
    log.info("rows of each run are held out", share=HELD_OUT, because="data.validation is not given")
    return attrs.evolve(reading.recipe, data=attrs.evolve(reading.recipe.data, validation=HELD_OUT))


def _folder_of(tree: Mapping[str, Any], base: Path | None, output_dir: str | Path | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    named = Path(str(tree.get("output_dir", FOLDER)))
    return named if base is None or "output_dir" not in tree else base / named


def _fresh_folder(folder: Path, recipe: Recipe, first: str) -> Path:
    """Return a new folder beside an existing one, the same on every rank and after a restart of a launch."""
    world = join_world(recipe.distributed, recipe.device)
    return Path(world.decide(lambda: str(begun(folder, folder_name(0, first)) or free_folder(folder))))


def _sliced(recipe: Recipe, sequence: TaskSequence, folder: Path) -> list[Task]:
    files = cut_rows(recipe, sequence.num_runs or 1, sequence.samples_per_run, folder / ROWS)
    recipes = [with_rows(recipe, file, sequence.steps_per_run) for file in files]
    tasks = [Task(name=slice_name(number), recipe=own) for number, own in enumerate(recipes)]
    return relate_tasks(tasks, sequence)


@contextlib.contextmanager
def _told_as_written(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Within this context, an error of a slice's row names the user's file and line, and refused slices are removed.

    The rows are read again as the user wrote them, which raises the error of the same row at its own place.
    """
    was_there = folder.exists()
    try:
        yield
    except LuthierError as error:
        if not was_there and folder.is_dir() and [path.name for path in folder.iterdir()] == [ROWS]:
            shutil.rmtree(folder, ignore_errors=True)  # another rank may remove it too
        if str(folder / ROWS) in (error.where or ""):
            prepared_data(recipe, Objects(), tokenizer_of(recipe.model), Wanted.of_part(resolve_parts(recipe).loss))
        raise
