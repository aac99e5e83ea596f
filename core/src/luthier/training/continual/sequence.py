"""The sequence: each task trained from what the one before left, and every task evaluated after each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.checkpoint.task_state import STATE
from luthier.data.formats.wanted import Wanted
from luthier.disk import write_json
from luthier.distributed.join import join_world
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.load import tokenizer_of
from luthier.recipe import resolve_parts
from luthier.recipe.objects import Objects
from luthier.training.assemble import assemble_run, usable_device
from luthier.training.best_metric import check_metrics
from luthier.training.continual.forgetting_report import TaskReport, write_report
from luthier.training.continual.tasks import Task, place_of
from luthier.training.reopen import evaluate_rows
from luthier.training.rows import prepared_data
from luthier.training.run import Run
from luthier.training.train_run import train

log = get_logger()
SCORES: Final = "scores.json"  # every task's metrics after one task, in that task's folder
BASE: Final = "scores-before.json"  # the same before the first task, in the folder of the whole run
Scores = list[dict[str, float]]  # the metrics of each task


def train_tasks(tasks: Sequence[Task], folder: Path, objects: Objects, *, eval_base: bool = True,
                allowed: frozenset[str] = frozenset()) -> TaskReport:  # fmt: skip
    """Train the tasks in order, resuming what is unfinished, and return the report, which is also written.

    Each task is a run in a folder of its own; the same command goes on where it was cut off, between tasks and within.
    """
    world = join_world(tasks[0].recipe.distributed, tasks[0].recipe.device)
    validation = [task_validation(task, objects) for task in tasks]  # refuses what it can before a folder appears
    before = world.decide(lambda: _scores_before(tasks, folder, objects, validation)) if eval_base else None
    runs: list[Run] = []
    after: list[Scores] = []
    for number, task in enumerate(tasks):
        carried = Path(tasks[number - 1].recipe.output_dir or "") / STATE if number else None
        place = place_of(tasks, number, carried)
        log.info("task", name=task.name, number=number + 1, of=len(tasks))
        runs.append(train(task.recipe, attrs.evolve(objects, task=place), allowed=allowed))
        after.append(_scores_after(runs[-1], validation, world))
    report = _reported(tasks, folder, runs, before, after)
    if world.is_main:
        write_report(report)
    return report


def task_validation(task: Task, objects: Objects) -> Any:
    """Return the held-out rows of a task, before any task is trained.

    Raises `data-empty` where it has none, and what its parts, device and rows refuse.
    """
    resolved = resolve_parts(task.recipe)
    usable_device(task.recipe, resolved, World())
    tokenizer = objects.tokenizer or tokenizer_of(task.recipe.model)
    rows = prepared_data(task.recipe, Objects(), tokenizer, Wanted.of_part(resolved.loss)).validation
    if rows is None:
        remedy = "Set data.validation, a share or a file, so that it is known what each task forgets."
        raise LuthierError("data-empty", f"task {task.name!r} has no validation rows", where="data.validation",
                           remedy=remedy)  # fmt: skip
    return rows


def _scores_before(tasks: Sequence[Task], folder: Path, objects: Objects, validation: Sequence[Any]) -> Scores:
    path = folder / BASE
    if not path.is_file():
        assembled = assemble_run(tasks[0].recipe, objects)
        setup = assembled.setup
        check_metrics(setup, assembled.callbacks)
        setup.undo.close()
        scores = [evaluate_rows(setup, rows) for rows in validation]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)
        setup.model.set_attn_implementation(setup.attention)
    return _read_scores(path)


def _scores_after(run: Run, validation: Sequence[Any], world: World) -> Scores:
    """Return every task's metrics after a run. Ranks that hold its model share the work; else rank 0 opens the run."""
    path = run.output_path / SCORES

    def write_scores() -> Scores:
        write_json(path, [evaluate_rows(run._trained(), rows) for rows in validation])
        return _read_scores(path)

    if world.decide(path.is_file):
        return world.decide(lambda: _read_scores(path))
    if not run.is_live or run._trained().world.size == 1:
        return world.decide(write_scores)
    scores = [evaluate_rows(run._trained(), rows) for rows in validation]
    if world.is_main:
        write_json(path, scores)
    return scores


def _read_scores(path: Path) -> Scores:
    scores: Scores = json.loads(path.read_text("utf-8"))
    return scores


def _reported(tasks: Sequence[Task], folder: Path, runs: Sequence[Run], before: Scores | None,
              after: Sequence[Scores]) -> TaskReport:  # fmt: skip
    names = [name for name in after[0][0] if all(name in scores for row in after for scores in row)]
    adapter = resolve_parts(tasks[0].recipe).adapter.name
    return TaskReport(
        output_path=folder,
        tasks=[task.name for task in tasks],
        runs=[run.output_path for run in runs],
        metrics={name: [[scores[name] for scores in row] for row in after] for name in names},
        base=None if before is None else {name: [scores[name] for scores in before] for name in names},
        seconds=[run.duration_seconds for run in runs],
        method=adapter,
    )
