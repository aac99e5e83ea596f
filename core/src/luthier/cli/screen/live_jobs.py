"""The live look of followed jobs on a terminal: a bar for one job, a table for several. In a pipe only lines appear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from luthier.cli.screen.jobs_view import age_text, event_line, job_lines
from luthier.jobs.job_numbers import job_progress
from luthier.jobs.store.job_events import read_events
from luthier.jobs.sync_twins import run_plainly

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from luthier.errors import LuthierError
    from luthier.jobs.manager import Manager
    from luthier.plugins.providing.job_records import Job, JobEvent

REFRESHES: Final = 2.0  # a second
WIDTH: Final = 30  # columns of a bar


class FollowedJob:
    """One job as it is now, drawn as a line: a bar over its steps, its loss and the time left."""

    def __init__(self, manager: Manager, id: str) -> None:
        self.manager, self.id = manager, id
        self._newest: list[JobEvent] = [e for e in read_events(manager.store, id)[0] if e.metrics][-1:]

    def note_event(self, event: JobEvent) -> None:
        """Keep an event that has numbers as the newest one."""
        if event.metrics:
            self._newest = [event]

    def draw_line(self) -> RenderableType:
        """Return the line as it looks now."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        job = self.manager.store.get_job(self.id)
        progress = job_progress(job, self._newest)
        cells: list[RenderableType] = [job.state.value]
        if progress.step is not None and progress.total_steps:
            cells.append(ProgressBar(total=progress.total_steps, completed=progress.step, width=WIDTH))
            cells.append(f"{progress.step}/{progress.total_steps}")
        if progress.loss is not None:
            cells.append(f"loss {progress.loss:.4f}")
        if progress.seconds_left is not None:
            cells.append(f"{age_text(progress.seconds_left)} left")
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(*cells)
        return line


@contextmanager
def live_view(screen: Console, draw: Callable[[], RenderableType]) -> Iterator[None]:
    """Draw again and again what `draw` returns, below all that is printed meanwhile, if the screen is a terminal."""
    if not screen.is_terminal:
        yield
        return
    from rich.live import Live

    with Live(get_renderable=draw, console=screen, refresh_per_second=REFRESHES, transient=True):
        yield


def follow_jobs(manager: Manager, jobs: Sequence[Job], screen: Console) -> dict[str, LuthierError]:
    """Follow jobs side by side to their ends, and return the errors of those that could not be followed, by id.

    On a terminal their table is drawn again and again; elsewhere their events are printed as lines.
    """
    waiting = [job.id for job in jobs if not job.is_final]

    def print_event(id: str, event: JobEvent) -> None:
        if not screen.is_terminal:
            screen.print(f"{id}  {event_line(event)}", soft_wrap=True)

    def draw_table() -> RenderableType:
        from rich.console import Group

        return Group(*job_lines(screen, [manager.store.get_job(job.id) for job in jobs]))

    with live_view(screen, draw_table):
        return run_plainly(_wait_for_all(manager, waiting, print_event))


async def _wait_for_all(
    manager: Manager, ids: Sequence[str], listener: Callable[[str, JobEvent], None]
) -> dict[str, LuthierError]:
    from luthier.errors import LuthierError

    waits = (manager.wait(id, listener=lambda event, id=id: listener(id, event)) for id in ids)  # type: ignore[misc]
    ends = await asyncio.gather(*waits, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, LuthierError):
            raise end
    return {id: end for id, end in zip(ids, ends, strict=True) if isinstance(end, LuthierError)}
