"""`luthier.on`: a callback made of plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.events import EVENTS, Events, event


def on(**functions: Callable[..., Any]) -> Any:
    """Return a callback made of functions by event: `luthier.on(step_ended=f, saved=g)`.

    Each function declares only the arguments it uses, of those in `luthier.plugins.events`. The short names of other
    tools work too: step_start, step_end, epoch_end, evaluate, save, log. Raises `recipe-unknown-option` for an unknown
    event, and `part-invalid` for something that is no function or has other arguments.
    """
    members: dict[str, Any] = {}
    for given, function in functions.items():
        name = SHORT.get(given, given)
        if name not in EVENTS:
            raise LuthierError("recipe-unknown-option", "no such event", where=f"on({given}=)",
                               remedy=suggest_nearest(given, EVENTS))  # fmt: skip
        members[name] = _marked(function, name)
    return type("FunctionCallback", (), members)()


SHORT = {
    "step_start": "step_started",
    "step_end": "step_ended",
    "epoch_end": "epoch_ended",
    "evaluate": "evaluated",
    "save": "saved",
    "log": "logged",
}


def _marked(function: Any, name: str) -> Any:
    """Return the function itself, marked as an event; pluggy reads its argument names from its code."""
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise LuthierError("part-invalid", "not a function or method", where=f"on({name}=)", found=function,
                           remedy="Write a function, or a lambda.")  # fmt: skip
    known = list(inspect.signature(getattr(Events, name)).parameters)[1:]
    unknown = [w for w in inspect.signature(function).parameters if w not in known]
    if unknown:
        problem, remedy = f"{name} has no argument {unknown[0]!r}", f"Declare only those used, of: {', '.join(known)}."
        raise LuthierError("part-invalid", problem, where=f"on({name}=)", remedy=remedy)
    event(function.__func__ if inspect.ismethod(function) else function)
    return staticmethod(function)
