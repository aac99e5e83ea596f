"""The events of a run, in the order in which they fire. A callback marks the ones it implements with `@luthier.event`.

    run_started(run)                                  a new run begins; or
    resumed(run, step)                                a run continues from a checkpoint
    task_started(run, task)                           a plain run has task 0; not when a task is resumed
    for each optimizer step:
        step_started(run, step)
        (forward, backward, clipping, optimizer step; on_nonfinite may skip the last)
        step_ended(run, step, metrics)
        if step % logging_steps == 0, or after the last step:
            logged(run, step, metrics)
        if an epoch has ended:
            epoch_ended(run, epoch)
        if evaluation is due:
            evaluated(run, step, metrics)
        if a checkpoint is complete (with async_save some steps after it was due):
            saved(run, step, path)                    `step` is the step after which it was taken
    task_ended(run, task)
    stopped(run, step, reason)                        only if the run ends before its last step
    completed(run, result)                            the artifact is written; or
    failed(run, error)                                an exception was raised

A method declares only the arguments that it uses. A callback never changes training; it may call
`run.request_stop(reason)`, `run.request_save()` and `run.request_evaluation()`. After a signal only `stopped` fires,
because neither the task nor the run is complete: the same command continues both. A callback may also have:

- `state()` and `load_state(state)`: what it must remember is kept in checkpoints.
- `every_rank = True`: it runs on all ranks, not only on rank 0.
- `needs_metrics = {option: metric}`: the evaluation metrics that it reads, by the option that names each. If the
  evaluation does not report one of them, the run is refused before it starts.
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
    """The signature of each event. `metrics` maps names to floats."""

    @eventspec
    def run_started(self, run: RunView) -> None:
        """A new run is about to take its first step."""

    @eventspec
    def resumed(self, run: RunView, step: int) -> None:
        """A run continues after `step`, the step of its checkpoint."""

    @eventspec
    def task_started(self, run: RunView, task: int) -> None:
        """Task `task` (from 0) begins. A plain run has one task, 0."""

    @eventspec
    def step_started(self, run: RunView, step: int) -> None:
        """Step `step` (from 1) begins."""

    @eventspec
    def step_ended(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` has changed the weights, or was skipped (`skipped_steps`). `metrics` are those of this step."""

    @eventspec
    def logged(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics since the last logging were written to metrics.jsonl; `metrics` are the same numbers."""

    @eventspec
    def epoch_ended(self, run: RunView, epoch: int) -> None:
        """Epoch `epoch` (from 0) has ended."""

    @eventspec
    def evaluated(self, run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        """The held-out rows were evaluated. The names of the metrics begin with `eval_`."""

    @eventspec
    def saved(self, run: RunView, step: int, path: Path) -> None:
        """The checkpoint folder `path`, taken after `step`, is complete."""

    @eventspec
    def task_ended(self, run: RunView, task: int) -> None:
        """The last step of task `task` is done."""

    @eventspec
    def stopped(self, run: RunView, step: int, reason: str) -> None:
        """The run ends after `step`, before its last step. `reason` says why."""

    @eventspec
    def completed(self, run: RunView, result: Any) -> None:
        """The run is complete. `result` is the `luthier.Run` that `luthier.train` returns."""

    @eventspec
    def failed(self, run: RunView, error: BaseException) -> None:
        """The run has raised `error`, and will end."""


log = get_logger()
EVENTS = tuple(name for name in vars(Events) if not name.startswith("_"))


def connect_callbacks(callbacks: Mapping[str, object]) -> Any:
    """Return the hooks of one run: calling an event on them calls it on every callback."""
    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    for name, callback in callbacks.items():
        manager.register(callback, name)
        manager.check_pending()
    return manager.hook


def announce_failure(hooks: Any, run: RunView, error: BaseException) -> None:
    """Call `failed` on each callback. An exception of one is logged and noted on `error`; the others are called."""
    arguments = {"run": run, "error": error}
    for listener in reversed(hooks.failed.get_hookimpls()):
        try:
            listener.function(*(arguments[name] for name in listener.argnames))
        except BaseException as second:  # the run's own error is the one to raise
            name, cause = listener.plugin_name, f"{type(second).__name__}: {second}"
            log.warning("a callback raised in its event failed", callback=name, error=cause)
            error.add_note(f"callback {name} raised in its event failed: {cause}")


def check_callback(callback: object, where: str) -> None:
    """Raise `part-invalid` if an event is misspelt or unmarked, or has arguments that do not exist."""
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
        remedy = f"Mark at least one with @luthier.event: {', '.join(EVENTS)}."
        raise LuthierError("part-invalid", "no event is marked, so this is no callback", where=where, remedy=remedy)
    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    try:
        manager.register(callback)
    except pluggy.PluginValidationError as error:
        raise LuthierError("part-invalid", " ".join(str(error).split()), where=where) from None
