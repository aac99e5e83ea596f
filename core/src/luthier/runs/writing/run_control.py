"""The control of a run: what is asked of it during a step, and how it goes on once the step is done."""

from __future__ import annotations

import enum

import attrs


class Course(enum.Enum):
    """The way a run goes on after this step, as all ranks have agreed."""

    ON = "on"  # the run goes to its next step, if there is one
    STOPPED = "stopped"  # somebody asked for the end: this step was the last one
    INTERRUPTED = "interrupted"  # a signal asked for the end: the same command resumes the run


@attrs.define(kw_only=True)
class RunControl:
    """The requests of callbacks, signals and files to a run, and what the ranks have agreed on.

    Requests come at any time, on any rank. They count from the end of the step on, when the ranks have agreed on them
    (`distributed.agreement`). A request that comes later waits for the end of the next step.
    """

    stop_reason: str | None = None  # why the run is to end after this step
    wants_save: bool = False
    wants_evaluation: bool = False
    signal: int | None = None  # the number of a signal that this process was sent
    agreed_signal: int | None = None  # the number of a signal that any rank was sent
    course: Course = Course.ON
    owes_evaluation: bool = False  # a signal came before the end of the evaluation after this step

    @property
    def is_ending(self) -> bool:
        """Return True if this rank knows that the step under way is the last one, of this process or of the run."""
        return self.stop_reason is not None or self.signal is not None

    def agree(self, stop_reason: str | None, *, saves: bool, evaluates: bool, signal: int | None) -> None:
        """Take what all ranks have asked for, and decide how the run goes on."""
        self.stop_reason, self.agreed_signal = stop_reason, signal
        self.wants_save, self.wants_evaluation = saves, evaluates
        ends = Course.ON if stop_reason is None else Course.STOPPED
        self.course = ends if signal is None else Course.INTERRUPTED

    def begin_evaluation(self) -> None:
        """Begin the evaluation that was asked for. It is owed until it is complete."""
        self.wants_evaluation, self.owes_evaluation = False, True

    def complete_evaluation(self) -> None:
        self.owes_evaluation = False

    def begin_save(self) -> None:
        """Clear the request for a checkpoint, which is being written."""
        self.wants_save = False
