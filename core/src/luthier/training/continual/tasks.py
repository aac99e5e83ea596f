"""Tasks of a continual run: one recipe for all, and what each task has of its own. This loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.options import option
from luthier.plugins.structure import structure_value
from luthier.recipe import Recipe, load_recipe
from luthier.recipe.objects import TaskPlace
from luthier.recipe.reading.recipe_files import find_file, read_recipe_file

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


@attrs.frozen(kw_only=True)
class TaskSequence:
    """The settings of a continual run that stand beside those of the recipe."""

    tasks: list[dict[str, Any]] = option(
        factory=list, help="The tasks in order, each {name:, data:} with any settings of a recipe that are its own."
    )
    num_runs: int | None = option(
        None,
        help="Cut the recipe's data into so many runs instead of tasks. A tenth of each run's rows is held out, unless "
        "data.validation is given.",
        low=1,
    )
    steps_per_run: int | None = option(None, help="Optimizer steps of each run; none: the recipe's length.", low=1)
    samples_per_run: int | None = option(None, help="Rows of each run; none: the rows divided evenly.", low=1)
    learning_rate_decay: float = option(
        1.0, help="Factor of the learning rate from each task to the next; a task's own rate stays.",
        low=0.01, high=1.0,
    )  # fmt: skip
    replay_share: float = option(
        0.0, help="Examples of the earlier tasks in a later one, as a share of its own; held-out rows are never used.",
        low=0.0, high=10.0,
    )  # fmt: skip
    eval_base: bool = option(
        True, help="Evaluate every task before the first one is trained: forward transfer needs it."
    )


@attrs.frozen(kw_only=True)
class Task:
    """One task: its name, the whole recipe that trains it, and the earlier tasks' recipes whose rows come again."""

    name: str
    recipe: Recipe
    has_rate: bool = False  # True if the learning rate is the task's own
    earlier: tuple[Recipe, ...] = ()
    replay_share: float = 0.0


SHARED: Final = ("model", "quantizer", "adapter")  # what a task takes over from the one before
FIELDS: Final = tuple(field.name for field in attrs.fields(TaskSequence))


def read_sequence(
    source: str | Path | Mapping[str, Any] | None, overrides: Any, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Path | None, TaskSequence, Any]:
    """Return the recipe's settings, the folder that its paths are relative to, the sequence, and the overrides.

    `overrides` is a mapping by dotted names, whose fields of the sequence are taken out, or flags; `given` are settings
    of the sequence that win over the source's. Raises `recipe-wrong-type` and the like with the option's name.
    """
    base: Path | None = None
    tree: dict[str, Any] = {}
    if isinstance(source, (str, Path)):
        file = find_file(Path(source))
        tree, base = dict(read_recipe_file(file)[0]), file.absolute().parent
    elif source is not None:
        tree = dict(source)
    own = {name: tree.pop(name) for name in FIELDS if name in tree}
    if isinstance(overrides, Mapping):
        own |= {name: value for name, value in overrides.items() if name in FIELDS}
        overrides = {name: value for name, value in overrides.items() if name not in FIELDS}
    sequence = structure_value({**own, **given}, TaskSequence, "continual")
    _check_sequence(sequence)
    return tree, base, sequence, overrides


def _check_sequence(sequence: TaskSequence) -> None:
    if bool(sequence.tasks) == (sequence.num_runs is not None):
        remedy = "Give tasks: [{name:, data:}, ...], or num_runs to cut the recipe's own data."
        raise LuthierError("recipe-missing", "tasks or num_runs, one of them", where="tasks", remedy=remedy)
    for length in ("steps_per_run", "samples_per_run"):
        if getattr(sequence, length) is not None and sequence.num_runs is None:
            problem, remedy = "it cuts one data set into runs", "Give num_runs."
            raise LuthierError("recipe-conflict", problem, where=length, remedy=remedy)
    seen: list[str] = []
    for number, task in enumerate(sequence.tasks):
        where = f"tasks.{number}"
        name = task.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            problem = "a task has a name of letters, digits, '.', '-' and '_'"
            raise LuthierError("recipe-wrong-type", problem, where=f"{where}.name", found=name)
        if name in seen:
            raise LuthierError("recipe-conflict", "two tasks have this name", where=f"{where}.name", found=name)
        if "data" not in task:
            remedy = suggest_nearest("data", list(task))
            raise LuthierError("recipe-missing", "a task has data", where=f"{where}.data", remedy=remedy)
        if "output_dir" in task:
            problem = "each task has a folder in that of the whole run"
            raise LuthierError("recipe-conflict", problem, where=f"{where}.output_dir", remedy="Leave it out.")
        seen.append(name)


def make_tasks(
    tree: Mapping[str, Any], base: Path | None, tasks: Sequence[Mapping[str, Any]], overrides: Any
) -> list[Task]:
    """Return each task with its whole recipe, which still lacks its folder."""
    made = []
    for task in tasks:
        own = {name: value for name, value in task.items() if name != "name"}
        shared = {name: value for name, value in tree.items() if name != "output_dir"}
        mapping = {**_without_rows(shared), **_merged_data(shared, own)}
        recipe = load_recipe(mapping, overrides, base=base).recipe
        recipe = attrs.evolve(recipe, output_dir=None)
        made.append(Task(name=task["name"], recipe=recipe, has_rate="learning_rate" in own))
    _check_shared(made)
    return made


def relate_tasks(tasks: Sequence[Task], sequence: TaskSequence) -> list[Task]:
    """Return the tasks with the learning rates and the earlier rows that follow from their order.

    Raises `recipe-conflict` where there is no learning rate to decay, or no rows to draw from.
    """
    if sequence.replay_share and any(task.recipe.data.streaming for task in tasks):
        raise stream_conflict()
    factor, related = sequence.learning_rate_decay, list[Task]()
    for number, task in enumerate(tasks):
        recipe = task.recipe
        if factor != 1.0 and not task.has_rate:
            if isinstance(recipe.learning_rate, str):
                problem, remedy = "the learning rate is not known yet", "Give learning_rate as a number."
                raise LuthierError("recipe-conflict", problem, where="learning_rate_decay", remedy=remedy)
            recipe = attrs.evolve(recipe, learning_rate=recipe.learning_rate * factor**number)
        earlier = tuple(before.recipe for before in tasks[:number]) if sequence.replay_share else ()
        related.append(attrs.evolve(task, recipe=recipe, earlier=earlier, replay_share=sequence.replay_share))
    return related


def stream_conflict() -> LuthierError:
    """Return the error for rows that should come again from a stream."""
    problem, remedy = "a stream has no rows to draw from", "Set data.streaming: false, or leave replay_share out."
    return LuthierError("recipe-conflict", problem, where="replay_share", remedy=remedy)


def place_of(tasks: Sequence[Task], number: int, carried: Path | None = None) -> TaskPlace:
    """Return a task's place among the others; `carried` is the folder of the state that it begins from."""
    task = tasks[number]
    return TaskPlace(index=number, total=len(tasks), carried=carried, earlier=task.earlier,
                     replay_share=task.replay_share)  # fmt: skip


def place_tasks(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """Return the tasks, each of which writes to a folder of its own inside `folder`."""
    places = [str(folder / folder_name(number, task.name)) for number, task in enumerate(tasks)]
    return [
        attrs.evolve(task, recipe=attrs.evolve(task.recipe, output_dir=place))
        for task, place in zip(tasks, places, strict=True)
    ]


def _check_shared(tasks: Sequence[Task]) -> None:
    """Raise `recipe-conflict` where a task has another model, quantizer or adapter than the first one."""
    first, *others = (task.recipe.to_dict() for task in tasks)
    for number, settings in enumerate(others, 1):
        for kind in SHARED:
            expected, given = _flattened(kind, first[kind]), _flattened(kind, settings[kind])
            differing = [name for name in {**expected, **given} if expected.get(name) != given.get(name)]
            if differing:
                name = differing[0]
                problem = f"all tasks train one adapter, and the first has {expected.get(name)!r}"
                remedy = f"Set {kind} once, beside tasks."
                where = f"tasks.{number}.{name}"
                raise LuthierError("recipe-conflict", problem, where=where, found=given.get(name), remedy=remedy)


def _flattened(kind: str, value: Any) -> dict[str, Any]:
    """Return the settings of a part by their dotted names."""
    return {f"{kind}.{name}": entry for name, entry in value.items()} if isinstance(value, Mapping) else {kind: value}


def folder_name(number: int, name: str) -> str:
    """Return the folder of a task inside that of the whole run."""
    return f"task-{number:02d}-{name}"


def _without_rows(shared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shared.items() if name != "data"}


def _merged_data(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's settings, its data over the settings of data that all tasks share."""
    common, data = shared.get("data"), own["data"]
    data = data if isinstance(data, Mapping) else {"train": data}
    if "path" in data and "train" not in data:
        return dict(own)
    if isinstance(common, Mapping):
        data = {**{name: value for name, value in common.items() if name != "train"}, **data}
    return {**own, "data": dict(data)}
