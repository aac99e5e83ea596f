"""The states of a job, which may follow which, and the stages of its submission."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """Where a job stands. `unknown` is a state that its service reports and we do not know; it is never final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    UNKNOWN = "unknown"

    @property
    def is_final(self) -> bool:
        """True where the job has ended, so that no later report can change its state."""
        return self in FINAL


class Stage(StrEnum):
    """How far the submission of a job has come; each is written before the act that it announces."""

    INTENT = "intent"  # validated and written down; nothing has left this machine
    UPLOADING = "uploading"
    UPLOADED = "uploaded"
    CREATING = "creating"  # the request may have been sent: whether the job exists must be looked up
    CREATED = "created"
    REFUSED = "refused"  # the service said no: there is no job


FINAL: Final = frozenset((JobState.COMPLETED, JobState.FAILED, JobState.CANCELED))
FOLLOWING: Final[dict[JobState, frozenset[JobState]]] = {
    state: frozenset((state,)) if state in FINAL else frozenset(JobState) for state in JobState
}  # running -> pending too: services put a job back into their queue


def advance_state(held: JobState, reported: JobState) -> tuple[JobState, bool]:
    """Return the state that holds after a report, and True where the report was legal. A final state is never left."""
    legal = reported in FOLLOWING[held]
    return (reported if legal else held), legal
