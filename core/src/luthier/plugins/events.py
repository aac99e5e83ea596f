"""The events of a run, drawn where they fire. A callback implements those it wants, with `@luthier.event`.

    run_started(run)                                  a new run; or, instead of it,
    resumed(run, step)                                a run that goes on from a checkpoint
    task_started(run, task)                           task 0 of a plain run; not again when it is resumed
    for each optimizer step:
        step_started(run, step)
        (forward, backward, clip, optimizer step; none where on_nonfinite skips it)
        step_ended(run, step, metrics)
        if step % logging_steps == 0 or it is the last:
            logged(run, step, metrics)
        if the last step of an epoch:
            epoch_ended(run, epoch)
        if evaluation is due:
            evaluated(run, step, metrics)
        if a checkpoint is due, and once it is complete (with async_save after a later step, or the last):
            saved(run, step, path)                    `step` is the step that it was taken after
    task_ended(run, task)
    stopped(run, step, reason)                        only if the run ended before its last step
    completed(run, result)                            the artifact is written; or
    failed(run, error)                                something raised

A callback declares only the arguments it uses. It watches, and may call `run.request_stop(reason)`,
`run.request_save()` and `run.request_evaluation()`; it never changes training. After a signal only `stopped` fires:
neither task nor run is complete, and the same command goes on with them. `state()` returns what a checkpoint keeps for
the callback, and `load_state(state)` restores it. `every_rank = True` lets it run on all ranks. `needs_metrics =
{option: metric}` lists the evaluation metrics that this callback reads, by the option that names each. If evaluation
does not report one, the run is refused before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from luthier.errors import LuthierError, suggest_nearest
from luthier.logs import get_logger

if TYPE_CHECKING:
    from luthier.plugins.contracts.run_view import RunView

eventspec = pluggy.HookspecMarker("luthier-events")
event = pluggy.HookimplMarker("luthier-events")


class Events:
    """The specifications of all events. `metrics` maps names to floats."""

    @eventspec
    def run_started(self, run: RunView) -> None:
        """A new run is about to take its first step."""

    @eventspec
    def resumed(self, run: RunView, step: int) -> None:
        """A run goes on after `step`, the last step that its checkpoint holds."""

    @eventspec
    def task_started(self, run: RunView, task: int) -> None:
        """Task `task` begins; a plain run has one task, 0."""

    @eventspec
    def step_started(self, run: RunView, step: int) -> None:
        """Step `step` (from 1) begins."""

    @eventspec
    def step_ended(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` has changed the weights, or was skipped (`skipped_steps`); `metrics` are this step's."""

    @eventspec
    def logged(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers since the last logging were written, as they stand in metrics.jsonl."""

    @eventspec
    def epoch_ended(self, run: RunView, epoch: int) -> None:
        """Epoch `epoch` (from 0) has been read to its end."""

    @eventspec
    def evaluated(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        """The held-out rows were scored; names begin with `eval_`."""

    @eventspec
    def saved(self, run: RunView, step: int, path: Path) -> None:
        """The checkpoint folder `path`, taken after `step`, is complete."""

    @eventspec
    def task_ended(self, run: RunView, task: int) -> None:
        """Task `task` has had its last step."""

    @eventspec
    def stopped(self, run: RunView, step: int, reason: str) -> None:
        """The run ended after `step`, before its last step."""

    @eventspec
    def completed(self, run: RunView, result: Any) -> None:
        """The run is done; `result` is the `luthier.Run` that the caller gets."""

    @eventspec
    def failed(self, run: RunView, error: BaseException) -> None:
        """The run raised `error`."""


log = get_logger()
EVENTS = tuple(name for name in vars(Events) if not name.startswith("_"))


def connect_callbacks(callbacks: Mapping[str, object]) -> Any:
    """Return the hooks of one run, by which each event calls every callback."""
    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    for name, callback in callbacks.items():
        manager.register(callback, name)
        manager.check_pending()
    return manager.hook


def announce_failure(hooks: Any, run: RunView, error: BaseException) -> None:
    """Tell each callback that the run raised `error`.

    If a callback raises too, its error is logged and added to `error` as a note.
    """
    arguments = {"run": run, "error": error}
    for listener in reversed(hooks.failed.get_hookimpls()):
        try:
            listener.function(*(arguments[name] for name in listener.argnames))
        except BaseException as second:  # raising it would hide the run's own error
            name, cause = listener.plugin_name, f"{type(second).__name__}: {second}"
            log.warning("a callback raised as it was told of the failure", callback=name, error=cause)
            error.add_note(f"callback {name} raised as it was told: {cause}")


def check_callback(callback: object, where: str) -> None:
    """Raise `part-invalid` if an object's events are misspelt, unmarked, or ask for arguments that do not exist."""
    marked = {name for name in dir(callback) if hasattr(getattr(callback, name, None), "luthier-events_impl")}
    for name in sorted(marked - set(EVENTS)):
        raise LuthierError(
            "part-invalid", f"there is no event {name}", where=where, remedy=suggest_nearest(name, EVENTS)
        )
    for name in EVENTS:
        if name not in marked and callable(getattr(callback, name, None)):
            remedy = "Mark it with @luthier.event."
            raise LuthierError("part-invalid", f"{name} is not marked as an event", where=where, remedy=remedy)
    if not marked:
        remedy = f"Mark methods with @luthier.event, of: {', '.join(EVENTS)}."
        raise LuthierError("part-invalid", "does not keep the callback protocol: no event", where=where, remedy=remedy)
    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    try:
        manager.register(callback)
    except pluggy.PluginValidationError as error:
        raise LuthierError("part-invalid", " ".join(str(error).split()), where=where) from None
