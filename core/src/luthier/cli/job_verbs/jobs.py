"""`luthier jobs`, `status`, `logs`, `cancel`, `download` and `attach`: what can be done with an existing job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.screen.answers import Answer, make_console
from luthier.cli.screen.flags import Json
from luthier.errors import LuthierError, suggest_nearest

if TYPE_CHECKING:
    from luthier.jobs.manager import Manager
    from luthier.plugins.providing.job_records import Job

Name = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, its beginning or end, or the service's id.")]


def jobs(
    *,
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    provider: Annotated[str | None, typer.Option(help="Only jobs of this provider.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1)] = 50,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the providers first.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the listed jobs until all have ended.")
    ] = False,
    json: Json = False,
) -> Any:
    """List the jobs, the newest first, as they were last seen. Ctrl-C leaves jobs that are followed running."""
    from luthier.cli.screen.jobs_view import draw_jobs
    from luthier.jobs.store.job_store import JobStore

    _check_state(status)
    if refresh:
        with _managing() as manager:
            manager.list_sync(status=status, provider=provider, limit=limit, refresh=True)
    store = JobStore()  # without the manager, whose import takes longer than reading the list
    listed, total = store.list_jobs(status, provider, limit), store.count_jobs(status, provider)
    if follow:
        _follow_listed(listed)
        listed = [store.get_job(job.id) for job in listed]
    store.close()
    document = {"jobs": [job.to_dict() for job in listed], "total": total}
    return Answer(document=document, view=lambda screen: draw_jobs(screen, listed, total))


def _check_state(status: str | None) -> None:
    from luthier.plugins.providing.job_state import JobState

    if status is not None and status not in list(JobState):
        raise LuthierError(
            "usage",
            f"there is no state {status!r}",
            where="--status",
            remedy=suggest_nearest(status, map(str, JobState)),
        )


def _follow_listed(listed: Sequence[Job]) -> None:
    """Follow jobs to their ends, and print which could not be followed and why."""
    from luthier.cli.screen.live_jobs import follow_jobs

    screen = make_console(stderr=True)
    with _managing() as manager:
        try:
            errors = follow_jobs(manager, listed, screen)
        except KeyboardInterrupt:
            problem, remedy = "detached; the jobs go on", "Come back with: luthier jobs --follow"
            raise LuthierError("interrupted", problem, remedy=remedy) from None
    for id, error in errors.items():
        screen.print(f"{id} could not be followed: {error.line}", soft_wrap=True)


def status(job: Name, *, json: Json = False) -> Any:
    """Show a job's state, progress, losses, time left and cost."""
    from luthier.cli.screen.jobs_view import draw_job
    from luthier.jobs.job_numbers import job_metrics, job_progress
    from luthier.jobs.store.job_events import read_events
    from luthier.plugins.providing.job_records import to_plain_data

    with _managing() as manager:
        manager.events_sync(job)
        record = manager.store.find_job(job)
        events, journal = read_events(manager.store, record.id)[0], manager.store.journal(record.id)
    progress, metrics = job_progress(record, events), job_metrics(record, events)
    document = {"job": record.to_dict(), "progress": to_plain_data(progress), "metrics": to_plain_data(metrics),
                "journal": journal}  # fmt: skip
    return Answer(document=document, view=lambda screen: draw_job(screen, record, progress, metrics))


def logs(
    job: Name,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job has ended.")] = False,
    json: Json = False,
) -> Any:
    """Show a job's events; with -f also new ones. Ctrl-C leaves the job running."""
    from luthier.cli.screen.follow_job import leaving_alone
    from luthier.cli.screen.jobs_view import draw_events, draw_log, event_line
    from luthier.plugins.providing.job_records import to_plain_data

    with _managing() as manager:
        events = manager.events_sync(job)
        record = manager.store.find_job(job)
        if follow and not record.is_final:
            screen = make_console(stderr=json)
            draw_events(screen, events)
            with leaving_alone([record.id]):
                manager.wait_sync(record.id, listener=lambda event: screen.print(event_line(event), soft_wrap=True))
            shown, events = events, manager.events_sync(record.id, refresh=False)
        else:
            shown = []
    rest = [] if shown or (follow and not record.is_final) else events
    return Answer(document={"events": [to_plain_data(event) for event in events]},
                  view=lambda screen: draw_log(screen, record, events, rest))  # fmt: skip


def cancel(job: Name, *, json: Json = False) -> Any:
    """Ask the provider to end a job."""
    from luthier.cli.screen.jobs_view import draw_job

    with _managing() as manager:
        record = manager.cancel_sync(job)
    return Answer(document={"job": record.to_dict()}, view=lambda screen: draw_job(screen, record))


def download(
    job: Name,
    *,
    output_dir: Annotated[
        Path | None, typer.Option(help="The folder; without it, one in the recipe's output_dir.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="adapter or model; without it, what the provider gives.")] = None,
    json: Json = False,
) -> Any:
    """Download a job's result, checked, with a manifest."""
    from luthier.cli.screen.jobs_view import draw_artifact, transfer_bar
    from luthier.plugins.providing.job_records import to_plain_data

    with _managing() as manager, transfer_bar(make_console(stderr=True), "download") as progress:
        artifact = manager.download_sync(job, output_dir, kind=kind, progress=progress)
    return Answer(document={"artifact": to_plain_data(artifact)}, view=lambda screen: draw_artifact(screen, artifact))


def attach(
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="A job's id; with --provider, the service's id of any job.")
    ],
    *,
    provider: Annotated[str | None, typer.Option(help="Add a job that was made elsewhere.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Only complete its submission; do not follow it.")] = False,
    json: Json = False,
) -> Any:
    """Come back to a job: complete its submission, and follow it."""
    from luthier.cli.screen.follow_job import follow_job, leaving_alone
    from luthier.cli.screen.jobs_view import draw_job

    with _managing() as manager:
        with leaving_alone([job]):
            record = manager.attach_sync(job, provider=provider)
        if not no_wait:
            return follow_job(manager, record.id)
    return Answer(document={"job": record.to_dict()}, view=lambda screen: draw_job(screen, record))


@contextmanager
def _managing() -> Iterator[Manager]:
    from luthier.jobs.manager import Manager

    manager = Manager()
    try:
        yield manager
    finally:
        manager.close()
