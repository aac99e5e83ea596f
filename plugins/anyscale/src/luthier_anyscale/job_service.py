"""Jobs of Anyscale: each is one job of its SDK, named by the job's id."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from luthier import (
    Capabilities,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobState,
    JobStatus,
    Parcel,
    ProviderError,
    drop_missing,
    pack_parcel,
    read_told,
    sent_words,
)

from luthier_anyscale import AnyscaleJobs
from luthier_anyscale.sdk_account import PLACE, SdkAccount

NAMED: Final = "luthier-"  # begins the name of each of our jobs
TAG: Final = "luthier_job"
PARCEL: Final = "parcel.tar.gz"
LARGEST: Final = 500_000_000  # bytes: Ray's limit of a working folder
GRACE: Final = "600"  # seconds that a stopped job has for its last checkpoint; Ray's default is 3
STATES: Final = {
    "STARTING": JobState.PENDING, "RUNNING": JobState.RUNNING, "SUCCEEDED": JobState.COMPLETED,
    "FAILED": JobState.FAILED, "TERMINATED": JobState.CANCELED,
}  # fmt: skip


def build_service(options: AnyscaleJobs) -> AnyscaleJobService:
    """Return the provider. It reads no key, and imports no SDK, before the first request."""
    return AnyscaleJobService(options)


class AnyscaleJobService:
    """The jobs of one project. The remote id of a job is Anyscale's own."""

    def __init__(self, options: AnyscaleJobs) -> None:
        self.options = options
        self._account = SdkAccount(options.address, options.api_key)
        self._packed: tuple[str, Parcel] | None = None

    def scope(self) -> str:
        options = self.options
        return "#".join([self._account.address, options.cloud or "", options.project or ""])

    async def check(self) -> Mapping[str, Any]:
        """List one job, which a refused key or an unknown cloud or project would not allow."""
        found = await self._account.read(lambda jobs: list(jobs.list(max_items=1, page_size=1, **self._place())))
        return {"address": self._account.address, "jobs": "some" if found else "none"}

    def _place(self) -> dict[str, Any]:
        """Return the cloud and the project to look in."""
        return {"include_all_users": True, **drop_missing(cloud=self.options.cloud, project=self.options.project)}

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", poll=(10.0, 60.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Pack the parcel, so that problems are reported before anything is sent."""
        size = len(self._parcel(job).content)
        if size <= LARGEST:
            return ()
        message = f"the packed recipe and rows have {size} bytes, but at most {LARGEST} can be sent"
        return [Finding(level="error", rule="size", where="data.train", message=message)]

    def _parcel(self, job: JobSpec) -> Parcel:
        if self._packed is None or self._packed[0] != job.id:
            self._packed = job.id, pack_parcel(job, self._folder(_name_job(job.id)), self.options.nproc_per_node)
        return self._packed[1]

    def _folder(self, name: str) -> str:
        return f"{self.options.folder.rstrip('/')}/{name}"

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Create the job. The SDK sends the parcel to the cloud's own storage first."""
        working = job.folder / "sent"
        working.mkdir(exist_ok=True)
        (working / PARCEL).write_bytes(self._parcel(job).content)
        settings = self._describe(job, working)
        id = await self._account.change(lambda jobs: jobs.submit(_make_config(settings)))
        return JobStatus(remote_id=str(id), state=JobState.PENDING, raw_state="STARTING")

    def _describe(self, job: JobSpec, working: Path) -> dict[str, Any]:
        """Return the fields of the SDK's `JobConfig`."""
        options, name = self.options, _name_job(job.id)
        words = ["python", "-u", *sent_words("run", self._folder(name)), PARCEL]
        return {
            "name": name,
            "entrypoint": shlex.join(words),
            "working_dir": str(working),
            "tags": {TAG: job.id},
            "max_retries": options.max_retries,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": GRACE},
            **({"requirements": self._parcel(job).packages} if options.install else {}),
            **drop_missing(
                cloud=options.cloud,
                project=options.project,
                compute_config=options.compute_config,
                image_uri=options.image_uri,
                timeout_s=options.time_limit,
            ),
        }

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Return the jobs of this name. Anyscale allows several, so that each is returned."""
        name = _name_job(job.id)
        found = await self._account.read(
            lambda jobs: list(jobs.list(name=name, include_archived=True, page_size=50, **self._place()))
        )
        return [self._status(item) for item in found if item.name == name]

    async def status(self, remote_id: str) -> JobStatus:
        """Return the status. The reason of a failure is read from the output, if it exists."""
        status = self._status(await self._account.read(lambda jobs: jobs.status(id=remote_id)))
        if status.state != JobState.FAILED:
            return status
        try:
            reason = (await self._read_output(remote_id)).reason or "Anyscale gives no reason"
        except ProviderError as error:
            reason = f"its output cannot be read: {error.problem}"
        return attrs.evolve(status, reason=reason)

    def _status(self, item: Any) -> JobStatus:
        raw = str(getattr(item.state, "value", item.state))
        state = STATES.get(raw, JobState.UNKNOWN)
        return JobStatus(
            remote_id=str(item.id),
            state=state,
            raw_state=raw,
            result_model=self._folder(str(item.name)) if state == JobState.COMPLETED else None,
            created=None if item.created_at is None else item.created_at.timestamp(),
            finished=item.status_updated_at.timestamp() if state.is_final and item.status_updated_at else None,
        )

    async def cancel(self, remote_id: str) -> None:
        """Terminate the job. It is no error if it ends meanwhile."""
        if (await self.status(remote_id)).state.is_final:
            return
        try:
            await self._account.change(lambda jobs: jobs.terminate(id=remote_id))
        except ProviderError:
            if not (await self.status(remote_id)).state.is_final:
                raise

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Return the newest of our jobs, which are known by their names."""

        def read_newest(jobs: Any) -> list[Any]:
            newest: list[Any] = []
            for item in jobs.list(page_size=50, sort_field="CREATED_AT", sort_order="DESC", **self._place()):
                if len(newest) == limit:
                    break
                newest += [item] if item.name.startswith(NAMED) else []
            return newest

        return [self._status(item) for item in await self._account.read(read_newest)]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        output = await self._read_output(remote_id)
        return EventPage(events=output.events[int(cursor or 0) :], cursor=str(len(output.events)))

    async def _read_output(self, remote_id: str) -> Any:
        text = await self._account.read(lambda jobs: jobs.get_logs(id=remote_id, mode="HEAD"))
        return read_told(str(text or "").splitlines())

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        """Return the path of the results on the cloud's storage, which the SDK cannot read."""
        status = await self.status(remote_id)
        if status.result_model is None:
            return ()
        return [JobArtifact(kind="hosted", name=status.result_model, downloadable=False)]

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        problem = f"the results stay on the cloud's storage, at {artifact.name}"
        raise ProviderError("unsupported", problem, where=PLACE)

    async def close(self) -> None:
        """Do nothing: the SDK keeps no connection that must be closed."""


def _name_job(id: str) -> str:
    return f"{NAMED}{id}"


def _make_config(settings: Mapping[str, Any]) -> Any:
    from anyscale.job.models import JobConfig

    return JobConfig(**settings)
