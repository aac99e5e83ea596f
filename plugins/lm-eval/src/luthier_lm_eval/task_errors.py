"""Task errors: whatever the harness raises over a task is one error of ours, with the task's name and the cause."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final

from luthier import LuthierError

from luthier_lm_eval import policy_model

HUB: Final = "The hub has the rows of most tasks: unset HF_HUB_OFFLINE, or give tasks with files of your own."
OWN: Final = "Correct the task's YAML file or its rows, if they are yours; else choose other tasks or options."
FIELD: Final = (
    "doc_to_"  # how the fields of a task that the harness computes with begin, and its methods of these names
)


def load_each(load: Callable[[list[Any]], Any], tasks: Sequence[Any], names: Sequence[str]) -> Any:
    """Return what `load` makes of all tasks; where it raises, the error names the task that cannot be loaded alone."""
    try:
        return load(list(tasks))
    except Exception as error:
        for task, name in zip(tasks, names, strict=True):
            try:
                load([task])
            except Exception as own:
                raise explain_loading(own, [name]) from own
        raise explain_loading(error, names) from error


def explain_loading(error: Exception, names: Sequence[str]) -> LuthierError:
    """Return the error of tasks that cannot be loaded: their rows cannot be had, or the tasks themselves are wrong."""
    no_rows = isinstance(error, (OSError, ImportError)) or (isinstance(error, ValueError) and _is_in(error, "datasets"))
    code, remedy = ("data-not-found", HUB) if no_rows else ("part-unsupported", OWN)
    problem = f"the task {' or '.join(map(repr, names))} cannot be loaded: {describe_cause(error)}"
    return LuthierError(code, problem, where="--tasks", remedy=remedy)


def explain_scoring(error: Exception, names: Sequence[str]) -> LuthierError | None:
    """Return the error of tasks that cannot be scored; None where it was the model that raised, and not the harness."""
    if isinstance(error, LuthierError) or _is_in(error, policy_model.__name__):
        return None
    names = _task_of(error) or names
    problem = f"the task {' or '.join(map(repr, names))} cannot be scored: {describe_cause(error)}"
    return LuthierError("part-unsupported", problem, where="--tasks", remedy=OWN)


def describe_cause(error: Exception) -> str:
    """Return type and text of an error on one line, and the harness's function that raised, or that read a field."""
    frames = [(_module(frame), frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [name for module, name in frames if module.startswith("lm_eval.api.") and not name.startswith("_")]
    fields = [name for name in names if name.startswith(FIELD)]
    place = f" (in {(fields or names)[-1]})" if names else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ") + place


def _is_in(error: Exception, module: str) -> bool:
    """Return True if an error went through a module, or a package's modules."""
    names = [_module(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name == module or name.startswith(f"{module}.") for name in names)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _task_of(error: Exception) -> list[str]:
    """Return the name of the task whose method raised."""
    from lm_eval.api.task import Task

    selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [str(own.task_name) for own in selves if isinstance(own, Task)][-1:]
