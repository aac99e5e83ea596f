"""Submission: a job that is written down becomes a job that exists at its service, exactly once.

    intent -> uploading -> uploaded -> creating -> created        each written before the act that it announces
                                           |------> refused        the service said no, and there is no job

After a lost answer, or a death in `creating`, the service is asked for the job before anything is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from luthier.errors import LuthierError
from luthier.jobs.clock import Clock
from luthier.jobs.making.price_estimate import check_cost
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.store.job_leases import hold_lease
from luthier.jobs.store.job_store import JobStore
from luthier.logs import get_logger
from luthier.plugins.providing.job_records import Job, JobStatus
from luthier.plugins.providing.job_state import Stage
from luthier.plugins.providing.provider_protocol import Provider

log = get_logger()
SETTLING: Final = (5.0, 15.0, 45.0)  # seconds between looks, because services list new jobs with a delay
CREATES: Final = 3  # the most requests; before each the service was found to have no such job
LONGEST_WAIT: Final = 120.0  # seconds: the longest wait that a service may ask for before a job is created
WRONG: Final = 2  # the exit status of errors in what the user gave
UploadTold = Callable[[str, int, int], None]  # role, bytes done, bytes in all


class Submission:
    """A driver that brings one job to its service. Any process may continue what another one began."""

    def __init__(self, store: JobStore, provider: Provider, clock: Clock, listener: UploadTold | None = None) -> None:
        self.store, self.provider, self.clock, self._told = store, provider, clock, listener

    async def drive(self, job: Job) -> Job:
        """Continue from the job's stage until it is created.

        Raises the `ProviderError` with which the service refuses it.
        """
        async with hold_lease(self.store, job.id, self.clock):
            job = self.store.get_job(job.id)
            if job.stage in (Stage.CREATED, Stage.REFUSED) or job.is_final:
                return job
            try:
                return await self._go_on(job)
            except LuthierError as error:
                if not self.store.get_job(job.id).is_final and error.code != "job-unclear":
                    way = f"`luthier attach {job.id}` goes on with this job; `submit` would make another."
                    error.remedy = f"{error.remedy} {way}".strip()
                raise

    async def _go_on(self, job: Job) -> Job:
        if job.stage == Stage.CREATING:
            existing = await self._find_existing(job)
            if existing is not None:
                return self._adopt(job, existing)
        else:
            job = await self._upload_files(job)
        return await self._create(job)

    async def settle_cancel(self, job: Job) -> Job:
        """Find out whether a job in `creating` exists at the service, and give it up if it does not."""
        async with hold_lease(self.store, job.id, self.clock):
            job = self.store.get_job(job.id)
            if job.stage == Stage.CREATING:
                existing = await self._find_existing(job)
                if existing is not None:
                    return self._adopt(job, existing)
            if job.stage == Stage.CREATED or job.is_final:
                return job
            return self.store.note_canceled(job.id, "canceled before it was created", self.clock.now())

    async def _upload_files(self, job: Job) -> Job:
        try:
            for role, file in job.spec.files.items():
                if role in job.uploads:
                    continue
                self.store.enter_stage(job.id, Stage.UPLOADING, self.clock.now(), role=role, sha256=file.sha256)
                known = self.store.known_upload(job.spec.scope, file.sha256)
                callback = None if self._told is None else _role_told(self._told, role)
                remote = await self.provider.upload(job.spec, file, known, callback)
                job = self.store.note_upload(job, role, remote, self.clock.now())
            estimate = await self.provider.estimate(job.spec, job.uploads) if job.spec.files else None
            if estimate is not None:
                check_cost(estimate, job.spec.max_cost)
        except (ProviderError, LuthierError) as error:
            if not isinstance(error, ProviderError) or not error.is_passing:
                self.store.note_refused(job.id, str(error), self.clock.now())
            raise
        return self.store.enter_stage(job.id, Stage.UPLOADED, self.clock.now())

    async def _create(self, job: Job) -> Job:
        for attempt in range(1, CREATES + 1):
            self.store.enter_stage(job.id, Stage.CREATING, self.clock.now(), attempt=attempt)
            try:
                status = await self.provider.submit(job.spec, job.uploads)
            except ProviderError as error:
                await self._weigh(job, error, last=attempt == CREATES)
            except LuthierError as error:
                if error.exit_status == WRONG:  # nothing was sent
                    self.store.note_refused(job.id, str(error), self.clock.now())
                raise
            else:
                return self.store.note_created(job.id, status, self.clock.now(), found=False)
            if self.store.get_job(job.id).stage == Stage.CREATING:
                existing = await self._find_existing(job)
                if existing is not None:
                    return self._adopt(job, existing)
        problem = f"{CREATES} requests were sent, and the service has no job that they made"
        self.store.note_refused(job.id, problem, self.clock.now())
        raise LuthierError("job-unclear", problem, where=job.id)

    async def _weigh(self, job: Job, error: ProviderError, *, last: bool) -> None:
        """Return if the job must be looked for or may be created again after an error of `submit`, else raise it."""
        now = self.clock.now()
        log.warning("creating a job", job=job.id, kind=error.kind, error=error.line)
        if error.may_have_created:
            self.store.note_step(job.id, "answer lost", now, error=error.line)
            return
        if error.is_passing:  # the request was turned away or never sent, so there is no job
            self.store.enter_stage(job.id, Stage.UPLOADED, now, error=error.line)
            wait = error.retry_after if error.retry_after is not None else SETTLING[0]
            if last or error.kind != "limited" or wait > LONGEST_WAIT:
                raise error
            await self.clock.sleep(wait)
            return
        self.store.note_refused(job.id, error.line, now)
        raise error

    async def _find_existing(self, job: Job) -> JobStatus | None:
        """Return the job that an earlier request made; None if it has not appeared after enough time."""
        begun = self.clock.now()
        for wait in (0.0, *SETTLING):
            await self.clock.sleep(wait)
            statuses = await self.provider.find(job.spec, job.uploads)
            if statuses is None:
                raise LuthierError("job-unclear", "the service cannot tell whether it made the job", where=job.id)
            if len(statuses) > 1:
                raise LuthierError("job-unclear", f"several jobs may be this one: {_ids(statuses)}", where=job.id)
            if statuses:
                return statuses[0]
        self.store.note_step(job.id, "not there", self.clock.now(), looked=self.clock.now() - begun)
        return None

    def _adopt(self, job: Job, status: JobStatus) -> Job:
        log.info("found the job that an earlier request made", job=job.id, remote_id=status.remote_id)
        return self.store.note_created(job.id, status, self.clock.now(), found=True)


def _ids(statuses: Sequence[JobStatus]) -> str:
    return ", ".join(status.remote_id for status in statuses)


def _role_told(listener: UploadTold, role: str) -> Callable[[int, int], None]:
    return lambda done, total: listener(role, done, total)
