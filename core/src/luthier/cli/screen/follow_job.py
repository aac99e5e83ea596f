"""The shared base of verbs that follow a job: its events as they come, and a Ctrl-C that leaves the job running."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from luthier.cli.screen.answers import Answer, make_console
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.jobs.manager import Manager
    from luthier.plugins.providing.job_records import Job, JobEvent


@contextlib.contextmanager
def leaving_alone(ids: Sequence[str]) -> Iterator[None]:
    """Turn Ctrl-C into a message on how to come back to the job, which goes on by itself."""
    try:
        yield
    except KeyboardInterrupt:
        if not ids:
            raise
        problem, remedy = f"detached; job {ids[0]} goes on", f"Come back with: luthier attach {ids[0]}"
        raise LuthierError("interrupted", problem, remedy=remedy) from None


def follow_job(manager: Manager, id: str, timeout: float | None = None) -> Answer:
    """Follow a job to its end, print its events, and return it. A failed or cancelled job raises an error."""
    from luthier.cli.screen.jobs_view import draw_job, event_line
    from luthier.cli.screen.live_jobs import FollowedJob, live_view

    screen, followed = make_console(stderr=True), FollowedJob(manager, id)

    def print_event(event: JobEvent) -> None:
        followed.note_event(event)
        screen.print(event_line(event), soft_wrap=True)

    with leaving_alone([id]), live_view(screen, followed.draw_line):
        job = manager.wait_sync(id, timeout=timeout, listener=print_event)
    raise_failure(job)
    return Answer(document={"job": job.to_dict()}, view=lambda view: draw_job(view, job))


def raise_failure(job: Job) -> None:
    """Raise `job-failed` or `job-canceled` for a job that ended in this way."""
    if job.state in ("failed", "canceled"):
        raise LuthierError(f"job-{job.state}", job.reason or f"it is {job.state}", where=job.id)
