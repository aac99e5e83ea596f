"""The control of a run: what is asked of it while a step goes on, and where it goes once the step is done."""

from __future__ import annotations

import enum

import attrs


class Course(enum.Enum):
    """Where a run goes after this step, as all ranks have agreed."""

    ON = "on"  # to its next step, if there is one
    STOPPED = "stopped"  # somebody asked for the end: this step was the last one
    INTERRUPTED = "interrupted"  # a signal asked for the end: the same command goes on


@attrs.define(kw_only=True)
class RunControl:
    """What callbacks, signals and files have asked of a run, and what the ranks have made of it.

    Requests come at any time, on any rank. They count from the end of the step on, when the ranks have agreed on them
    (`distributed.agreement`); one that comes later waits for the end of the next step.
    """

    stop_reason: str | None = None  # why the run is to end after this step
    wants_save: bool = False
    wants_evaluation: bool = False
    signal: int | None = None  # that this process was sent
    agreed_signal: int | None = None  # that any rank was sent
    course: Course = Course.ON
    owes_evaluation: bool = False  # a signal came before the end of the evaluation after this step

    @property
    def is_ending(self) -> bool:
        """True where this rank knows that the step under way is the last one, for now or for good."""
        return self.stop_reason is not None or self.signal is not None

    def agree(self, stop_reason: str | None, *, saves: bool, evaluates: bool, signal: int | None) -> None:
        """Take what all ranks have asked for, which decides the course."""
        self.stop_reason, self.agreed_signal = stop_reason, signal
        self.wants_save, self.wants_evaluation = saves, evaluates
        ends = Course.ON if stop_reason is None else Course.STOPPED
        self.course = ends if signal is None else Course.INTERRUPTED

    def begin_evaluation(self) -> None:
        """The evaluation that was asked for begins, and is owed until it is complete."""
        self.wants_evaluation, self.owes_evaluation = False, True

    def complete_evaluation(self) -> None:
        self.owes_evaluation = False

    def begin_save(self) -> None:
        """The checkpoint that was asked for is on its way."""
        self.wants_save = False
