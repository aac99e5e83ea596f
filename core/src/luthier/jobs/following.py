"""Following: a job's state and events are kept up to date by polling that backs off and survives passing failures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import attrs

from luthier.errors import LuthierError
from luthier.jobs.clock import Clock
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.store.job_events import keep_events, read_cursor
from luthier.jobs.store.job_store import JobStore
from luthier.plugins.providing.job_records import EventPage, Job, JobEvent
from luthier.plugins.providing.job_state import JobState
from luthier.plugins.providing.provider_protocol import Provider

GROWTH: Final = 1.5  # factor of the interval after each look that sees nothing new
JITTER: Final = 0.2
FAILURES: Final = 20  # passing failures in a row before one is raised
PAGES: Final = 1000  # the most pages of events in one look
STALLED: Final = 3600.0  # seconds of running without any change before a warning
EventTold = Callable[[JobEvent], None]


@attrs.define(kw_only=True)
class Polling:
    """The interval between two looks: short after a change, longer and longer without one."""

    shortest: float
    longest: float
    generator: random.Random = attrs.field(factory=random.Random)
    _current: float | None = None

    def next_wait(self, *, changed: bool) -> float:
        """Return the seconds until the next look."""
        grown = self.shortest if changed or self._current is None else self._current * GROWTH
        self._current = min(max(grown, self.shortest), self.longest)
        return self._current * self.generator.uniform(1 - JITTER, 1 + JITTER)


@attrs.define(kw_only=True)
class StallWatch:
    """A watch for a running job that stands still for long: same state, phase and step. It warns once."""

    since: float  # when something last changed
    seen: object = None
    told: bool = False

    def look(self, job: Job, now: float) -> bool:
        """Take note of a job, and return True if something about it has changed."""
        current = (job.raw_state, job.phase, job.status.progress.step if job.status else None)
        changed, self.seen = current != self.seen, current
        if changed:
            self.since, self.told = now, False
        return changed

    def is_due(self, job: Job, now: float) -> bool:
        """Return True, once, if the job has stood still for too long."""
        if self.told or job.state != JobState.RUNNING or now - self.since < STALLED:
            return False
        self.told = True
        return True

    def text(self, now: float) -> str:
        """Return the text of the warning."""
        return f"nothing has changed for {int(now - self.since) // 60} minutes"


class Follower:
    """A follower that looks at one job until it has ended."""

    def __init__(self, store: JobStore, provider: Provider, clock: Clock, listener: EventTold | None = None) -> None:
        self.store, self.provider, self.clock = store, provider, clock
        self._told = listener or (lambda event: None)
        self._unread = 0  # failed readings of events in a row

    async def refresh(self, job: Job) -> Job:
        """Ask the service for the job's state, and store the answer."""
        if job.is_final or job.remote_id is None:
            return job
        status = await self.provider.status(job.remote_id)
        before, (job, legal) = job, self.store.save_status(job.id, status, self.clock.now())
        if not legal:
            text = f"the service now reports {status.raw_state!r} for a job that had ended as {before.state}"
            self._keep(job, _warning(f"revived:{status.raw_state}", self.clock.now(), text))
        elif job.state == JobState.UNKNOWN:
            text = f"the service reports the state {status.raw_state!r}, which is not known; polling goes on"
            self._keep(job, _warning(f"unknown:{status.raw_state}", self.clock.now(), text))
        return job

    async def read_events(self, job: Job) -> list[JobEvent]:
        """Read and store the new events. A service whose pages never end is cut off with a `protocol` error."""
        fresh: list[JobEvent] = []
        if job.remote_id is None:
            return fresh
        for _ in range(PAGES):
            cursor = read_cursor(self.store, job.id)
            page = await self.provider.events(job.remote_id, cursor)
            events = keep_events(self.store, job.id, page)
            for event in events:
                self._told(event)
            fresh += events
            if not page.events or page.cursor == cursor or not events:
                return fresh
        raise ProviderError("protocol", f"the events did not end after {PAGES} pages", where=job.id)

    async def wait_final(self, job: Job, polling: Polling, timeout: float | None = None, *, events: bool = True) -> Job:
        """Look again and again until the job has ended, and return it. Raises `job-timeout` after `timeout` seconds."""
        begun, failures, watch = self.clock.monotonic(), 0, StallWatch(since=self.clock.monotonic())
        while True:
            wait_least = 0.0
            try:
                job = await self.refresh(job)
                failures = 0
                if events:
                    wait_least = await self._try_events(job)
            except ProviderError as error:
                failures += 1
                if not error.is_passing or failures >= FAILURES:
                    raise
                wait_least = error.retry_after or 0.0
            if job.is_final:
                return job
            now = self.clock.monotonic()
            changed = watch.look(job, now)
            if watch.is_due(job, now):
                self._keep(job, _warning(f"stalled:{watch.seen}", self.clock.now(), watch.text(now)))
            left = float("inf") if timeout is None else timeout - (now - begun)
            if left <= 0:
                raise LuthierError("job-timeout", f"it is {job.state} after {timeout:g} s", where=job.id)
            await self.clock.sleep(min(max(polling.next_wait(changed=changed), wait_least), left))

    async def _try_events(self, job: Job) -> float:
        """Read the new events, and return for how many seconds the service asks not to be called.

        A failure to read them ends no waiting: it becomes one warning, if it is not passing or the job has ended.
        """
        try:
            await self.read_events(job)
        except ProviderError as error:
            self._unread += 1
            if job.is_final or not error.is_passing or self._unread >= FAILURES:
                text = f"the events cannot be read: {error.line}"
                self._keep(job, _warning(f"unread:{error.kind}", self.clock.now(), text))
            return error.retry_after or 0.0
        self._unread = 0
        return 0.0

    def _keep(self, job: Job, event: JobEvent) -> None:
        for fresh in keep_events(self.store, job.id, EventPage(events=[event], cursor=None)):
            self._told(fresh)


def _warning(id: str, at: float, message: str) -> JobEvent:
    return JobEvent(id=id, at=at, kind="warning", level="warning", message=message)
