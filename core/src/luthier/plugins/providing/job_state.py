"""The states of a job, which state may follow which, and the stages of its submission."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """The state of a job. `unknown` stands for a state of the service that we do not know; it is never final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    UNKNOWN = "unknown"

    @property
    def is_final(self) -> bool:
        """Return True if the job has ended, so that no later report can change its state."""
        return self in FINAL


class Stage(StrEnum):
    """The stage that a job's submission has reached. Each stage is written down before the act that it announces."""

    INTENT = "intent"  # checked and written down; nothing has left this machine
    UPLOADING = "uploading"
    UPLOADED = "uploaded"
    CREATING = "creating"  # the request may have been sent: the service must be asked whether the job exists
    CREATED = "created"
    REFUSED = "refused"  # the service refused: there is no job


FINAL: Final = frozenset((JobState.COMPLETED, JobState.FAILED, JobState.CANCELED))
FOLLOWING: Final[dict[JobState, frozenset[JobState]]] = {
    state: frozenset((state,)) if state in FINAL else frozenset(JobState) for state in JobState
}  # running -> pending is legal too, because services put a job back into their queue


def advance_state(state: JobState, reported: JobState) -> tuple[JobState, bool]:
    """Return the state after a report, and True if the report was legal. A final state is never left."""
    legal = reported in FOLLOWING[state]
    return (reported if legal else state), legal
