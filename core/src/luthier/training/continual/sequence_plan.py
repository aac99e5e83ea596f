"""The plan of a sequence: what each task would train, take and write, without training and without a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from luthier.recipe import Recipe, resolve_parts
from luthier.recipe.objects import Objects
from luthier.runs.writing.target import find_place
from luthier.training.continual.sequence import task_validation
from luthier.training.continual.tasks import Task, place_of
from luthier.training.planning.plan_run import Plan, plan


@attrs.frozen(kw_only=True)
class TaskPlan:
    """What one task would be. None for what is not known before its rows are read, or has no end.

    `state` is `new`, `completed`, or how the unfinished run in its folder ended. `seconds` are those of its steps.
    """

    name: str
    output_path: Path
    state: str
    data: list[str]
    examples: int | None
    validation_examples: int
    steps: int | None
    epochs: float | None
    tokens: int | None
    peak_learning_rate: float
    evaluations: int | None
    memory: dict[str, int]
    fits: bool | None
    seconds: float | None
    disk: dict[str, int]
    warnings: list[str]


@attrs.frozen(kw_only=True)
class SequencePlan:
    """What a sequence of tasks would be, and the sums of it."""

    output_path: Path
    method: str
    base_evaluated: bool
    tasks: list[TaskPlan]

    @property
    def total(self) -> dict[str, float | None]:
        """Return the sums over the tasks, and the largest memory; None where a task's number is not known.

        `evaluations` counts every time that the rows of a task are gone through: while it trains, and all of them after
        each task and before the first one.
        """
        rounds, held_out = len(self.tasks) + self.base_evaluated, [task.validation_examples for task in self.tasks]
        own = [task.evaluations for task in self.tasks]
        rows = [None if n is None else n * size for n, size in zip(own, held_out, strict=True)]
        between = rounds * len(self.tasks)
        return {
            "steps": _sum([task.steps for task in self.tasks]),
            "tokens": _sum([task.tokens for task in self.tasks]),
            "evaluations": _sum([*own, between]),
            "evaluated_rows": _sum([*rows, rounds * sum(held_out)]),
            "seconds": _sum([task.seconds for task in self.tasks]),
            "memory": max(task.memory["total"] for task in self.tasks),
            "disk": _sum([task.disk["total"] for task in self.tasks]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it."""
        plain = attrs.asdict(self, value_serializer=lambda _, __, v: str(v) if isinstance(v, Path) else v)
        return {**plain, "total": self.total}


def plan_tasks(
    tasks: Sequence[Task], folder: Path, written: Sequence[Recipe], *, eval_base: bool, allowed: frozenset[str]
) -> SequencePlan:
    """Return what the tasks would be. Raises whatever the sequence would refuse before its first step.

    `written` are the recipes as the sequence itself would write them, whose rows need not be there yet.
    """
    for task in tasks:
        task_validation(task, Objects())
    places = [place_of(tasks, number) for number in range(len(tasks))]
    plans = [plan(task.recipe, Objects(task=place)) for task, place in zip(tasks, places, strict=True)]
    return SequencePlan(
        output_path=folder,
        method=resolve_parts(tasks[0].recipe).adapter.name,
        base_evaluated=eval_base,
        tasks=[
            _task_plan(task.name, recipe, found, _state_of(recipe, allowed))
            for task, recipe, found in zip(tasks, written, plans, strict=True)
        ],
    )


def _state_of(recipe: Recipe, allowed: frozenset[str]) -> str:
    """Return what the run's folder holds. Raises `run-folder-other` where it is another run's."""
    place = find_place(recipe, Objects(), fresh=False, allowed=allowed)
    return "new" if place.record is None else "completed" if place.done else str(place.record["state"])


def _task_plan(name: str, recipe: Recipe, found: Plan, state: str) -> TaskPlan:
    schedule = found.schedule
    epochs, per_epoch = schedule["epochs"], schedule["tokens_per_epoch"]
    return TaskPlan(
        name=name,
        output_path=Path(str(recipe.output_dir)),
        state=state,
        data=[source.path for source in recipe.data.train],
        examples=schedule["examples"],
        validation_examples=schedule["validation_examples"],
        steps=schedule["total_steps"],
        epochs=epochs,
        tokens=None if epochs is None or per_epoch is None else round(epochs * per_epoch),
        peak_learning_rate=schedule["peak_learning_rate"],
        evaluations=_count_evaluations(recipe, schedule["total_steps"]),
        memory=found.memory,
        fits=found.device["fits"],
        seconds=found.time.get("seconds"),
        disk=found.disk,
        warnings=[*found.notes, *found.data["warnings"]],
    )


def _count_evaluations(recipe: Recipe, steps: int | None) -> int | None:
    """Return how often the task's own rows are evaluated while it trains: by `eval_steps`, and after the last step."""
    if steps is None:
        return None
    every = recipe.eval_steps or steps
    return -(-steps // every) + recipe.eval_on_start


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
