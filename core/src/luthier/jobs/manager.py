"""The manager: it submits, follows and collects jobs, in the same way on this machine and at every service."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.jobs.clock import Clock, current_clock, use_clock
from luthier.jobs.collecting import collect_artifact
from luthier.jobs.following import EventTold, Follower, Polling
from luthier.jobs.job_numbers import job_metrics, job_progress
from luthier.jobs.making.given_rows import is_named, write_given
from luthier.jobs.making.preparing import PreparedJob, make_room, new_job_id, prepare_job
from luthier.jobs.making.submission import Submission, UploadTold
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.restoring import ReadyProvider, make_provider, restore_provider
from luthier.jobs.store.job_events import read_events
from luthier.jobs.store.job_store import JobStore
from luthier.jobs.sync_twins import SyncTwins
from luthier.jobs.transport.request_turns import RequestTurns, use_turns
from luthier.plugins.providing.job_records import (
    Job,
    JobEvent,
    JobMetrics,
    JobProgress,
    JobSpec,
    Progress,
    TrainedArtifact,
)
from luthier.plugins.providing.job_state import Stage
from luthier.recipe import Reading, load_recipe


class Manager(SyncTwins):
    """A manager of jobs. Each of its async methods has a plain twin named `..._sync`; `__init__` and `close` are not
    async.

    `folder` holds the store, the recipes and the converted data; None means `LUTHIER_JOBS`, or the user's data folder.
    Jobs outlive the manager: another manager, in another process, goes on with them. To go on with a job of a provider
    object that the caller made, give the object to `use_provider`.
    """

    def __init__(
        self, folder: str | Path | None = None, *, clock: Clock | None = None, store: JobStore | None = None
    ) -> None:
        self.store = store or JobStore(Path(folder) if folder is not None else None)
        self.clock: Clock = clock or current_clock()
        self._objects: dict[str, ReadyProvider] = {}
        self._turns = RequestTurns(self.store.folder)

    async def submit(
        self, recipe: Any = None, *, provider: Any = None, data: Any = None, eval_data: Any = None,
        max_cost: float | None = None, listener: Callable[[PreparedJob], None] | None = None,
        uploading: UploadTold | None = None, **settings: Any,
    ) -> Job:  # fmt: skip
        """Check, convert and journal a job, then create it at its provider, once. Return as soon as it exists.

        `recipe`, `data` and `settings` are those of `luthier.train`. `listener` is called with the prepared job, its
        findings and its cost before anything is sent; `uploading` is called as files are sent.
        """
        reading, room = self._read(recipe, provider, data, eval_data, settings)
        async with self._prepared(reading, provider, room, max_cost) as (ready, prepared):
            if listener is not None:
                listener(prepared)
            job = self.store.add_job(prepared.spec, self.clock.now())
            if ready.options is None:
                self._objects[job.id] = ready
            return await Submission(self.store, ready.part, self.clock, uploading).drive(job)

    async def prepare(
        self, recipe: Any = None, *, provider: Any = None, data: Any = None, eval_data: Any = None,
        max_cost: float | None = None, **settings: Any,
    ) -> PreparedJob:  # fmt: skip
        """Do the part of `submit` that happens on this machine, and return what would be sent. Nothing is stored."""
        reading, room = self._read(recipe, provider, data, eval_data, settings)
        try:
            async with self._prepared(reading, provider, room, max_cost) as (_, prepared):
                return prepared
        finally:
            shutil.rmtree(room, ignore_errors=True)

    async def status(self, name: str) -> Job:
        """Return the job with its state now, as its provider reports it.

        A job that was not created yet is read from the store.
        """
        job = self.store.find_job(name)
        async with self._provider_of(job) as part:
            return await Follower(self.store, part, self.clock).refresh(job)

    async def progress(self, name: str) -> JobProgress:
        """Return step, epoch, loss, learning rate, tokens and time left. What is not known is None."""
        job = await self._looked_at(name)
        return job_progress(job, read_events(self.store, job.id)[0])

    async def metrics(self, name: str) -> JobMetrics:
        """Return losses, duration, tokens and cost. What is not known is None."""
        job = await self._looked_at(name)
        return job_metrics(job, read_events(self.store, job.id)[0])

    async def wait(self, name: str, timeout: float | None = None, listener: EventTold | None = None) -> Job:
        """Wait until a job has ended. If its submission was cut off, complete it first.

        `timeout` is in seconds; None waits for ever. Raises `job-timeout` after it. `listener` is called with each new
        event.
        """
        job = await self.attach(name)
        async with self._provider_of(job) as part:
            capabilities = await part.capabilities(job.spec.model)
            polling = Polling(shortest=capabilities.poll[0], longest=capabilities.poll[1])
            follower = Follower(self.store, part, self.clock, listener)
            return await follower.wait_final(job, polling, timeout, events=capabilities.events)

    async def events(self, name: str, *, refresh: bool = True) -> list[JobEvent]:
        """Return every event of a job so far, oldest first. With `refresh`, the provider is asked for new ones."""
        job = await self._looked_at(name) if refresh else self.store.find_job(name)
        return read_events(self.store, job.id)[0]

    async def cancel(self, name: str) -> Job:
        """Ask the provider to end a job, which may still complete. A job that has ended is returned as it is."""
        job = self.store.find_job(name)
        if job.is_final:
            return job
        job = self.store.request_cancel(job.id, self.clock.now())
        async with self._provider_of(job) as part:
            if job.stage != Stage.CREATED:
                job = await Submission(self.store, part, self.clock).settle_cancel(job)
            if job.is_final or job.remote_id is None:
                return job
            follower = Follower(self.store, part, self.clock)
            try:
                await part.cancel(job.remote_id)
            except ProviderError as error:
                job = await follower.refresh(job)
                if not job.is_final or error.kind not in ("exists", "invalid", "not_found"):
                    raise
                return job
            self.store.note_step(job.id, "cancel sent", self.clock.now())
            return await follower.refresh(job)

    async def list(
        self, *, status: str | None = None, provider: str | None = None, limit: int | None = None, refresh: bool = False
    ) -> list[Job]:
        """Return jobs, newest first. Without `refresh` no provider is asked: they are as they were last seen."""
        jobs = self.store.list_jobs(status, provider, limit)
        if not refresh:
            return jobs
        for job in jobs:
            if not job.is_final and job.stage == Stage.CREATED:
                await self.status(job.id)
        return self.store.list_jobs(status, provider, limit)

    async def download(
        self, name: str, folder: str | Path | None = None, *, kind: str | None = None, progress: Progress | None = None
    ) -> TrainedArtifact:
        """Download a job's result to `folder`, or to a folder in the recipe's output_dir.

        `kind` is adapter or model.
        """
        job = await self.status(name)
        if job.remote_id is None:
            raise LuthierError("artifact-not-found", f"the job is {job.state} and was never created", where=job.id)
        metrics = job_metrics(job, read_events(self.store, job.id)[0])
        async with self._provider_of(job) as part:
            return await collect_artifact(job, part, Path(folder) if folder else None, kind, metrics, progress)

    async def attach(self, name: str, provider: Any = None) -> Job:
        """Return a job by its name, and complete its submission if that was cut off.

        With `provider`, `name` may be the service's id of a job that was made elsewhere: the job is added to the store.
        """
        if provider is not None:
            return await self._take_in(name, provider)
        job = self.store.find_job(name)
        if job.stage in (Stage.CREATED, Stage.REFUSED) or job.is_final:
            return job
        async with self._provider_of(job) as part:
            return await Submission(self.store, part, self.clock).drive(job)

    def use_provider(self, name: str, provider: Any) -> None:
        """Use the caller's provider object for jobs of this name; the store cannot make such an object again."""
        self._objects[self.store.find_job(name).id] = make_provider(provider)

    def close(self) -> None:
        """Close the store. Jobs keep running."""
        self.store.close()

    async def _take_in(self, remote_id: str, provider: Any) -> Job:
        ready = make_provider(provider)
        async with self._closing(ready) as part:
            status = await part.status(remote_id)
            known = [j for j in self.store.list_jobs(provider=ready.name) if j.remote_id == remote_id]
            if known:
                return known[0]
            now = self.clock.now()
            id = new_job_id(now)
            spec = JobSpec(
                id=id, provider=ready.name, options=ready.options or {}, scope=part.scope(), model="unknown",
                method="unknown", settings={}, folder=self.store.folder / "jobs" / id,
                output_dir=Path(f"runs/{id}").absolute(), created=now,
            )  # fmt: skip
            self.store.add_job(spec, now, Stage.CREATED, remote_id)
            return self.store.save_status(id, status, now)[0]

    async def _looked_at(self, name: str) -> Job:
        """Return the job after asking for its state and events; of a provider without events, for its state alone."""
        job = self.store.find_job(name)
        async with self._provider_of(job) as part:
            follower = Follower(self.store, part, self.clock)
            job = await follower.refresh(job)
            if (await part.capabilities(job.spec.model)).events:
                await follower.read_events(job)
        return job

    def _read(self, recipe: Any, provider: Any, data: Any, eval_data: Any, settings: dict[str, Any]) -> Any:
        """Return the recipe that these arguments mean, and the new job's folder, which holds rows given as objects."""
        room, changes = make_room(self.store.folder, self.clock.now()), dict(settings)
        try:
            for role, value, where in (("training", data, "data"), ("validation", eval_data, "data.validation")):
                if value is not None:
                    path = value if is_named(value) else str(write_given(value, room, role))
                    changes[where] = [path] if role == "validation" and isinstance(path, str) else path
            if isinstance(recipe, Reading) and not changes:
                return recipe, room
            return load_recipe({} if recipe is None else recipe, changes), room
        except BaseException:
            shutil.rmtree(room, ignore_errors=True)
            raise

    @asynccontextmanager
    async def _prepared(
        self, reading: Reading, provider: Any, room: Path, max_cost: float | None
    ) -> AsyncIterator[Any]:
        ready = make_provider(reading.recipe.provider if provider is None else provider)
        async with self._closing(ready):
            try:
                prepared = await prepare_job(reading, ready, room, self.clock.now(), max_cost)
            except BaseException:
                shutil.rmtree(room, ignore_errors=True)
                raise
            yield ready, prepared

    def _provider_of(self, job: Job) -> Any:
        return self._closing(self._objects[job.id] if job.id in self._objects else restore_provider(job))

    @asynccontextmanager
    async def _closing(self, ready: ReadyProvider) -> AsyncIterator[Any]:
        """Yield the provider's part, which waits by the manager's clock and takes its turns beside other processes.

        Its connections are closed afterwards.
        """
        async with AsyncExitStack() as stack:
            stack.enter_context(use_clock(self.clock))
            stack.enter_context(use_turns(self._turns))
            stack.push_async_callback(ready.part.close)
            yield ready.part
