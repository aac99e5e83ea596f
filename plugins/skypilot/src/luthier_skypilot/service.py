"""Jobs of SkyPilot: each is one managed job, named by the job's id. SkyPilot itself is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from luthier import (
    Capabilities,
    CostEstimate,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobState,
    JobStatus,
    ProviderError,
    ToldRun,
    pack_parcel,
    parcel_variables,
    read_told,
)

from luthier_skypilot import Skypilot
from luthier_skypilot.managed_job import NAMED, describe_task, name_job, read_plan, read_record, result_folder
from luthier_skypilot.server import SkypilotServer

LARGEST: Final = 500_000  # largest parcel in characters: it travels in the task's variables
PAGE: Final = 100
FIELDS: Final = ("job_id", "job_name", "task_name", "status", "failure_reason", "submitted_at", "end_at")


def build_service(options: Skypilot) -> SkypilotService:
    """Return the provider. It opens no connection before the first request."""
    return SkypilotService(options)


class SkypilotService:
    """The managed jobs of one server. The remote id of a job is the server's number of it."""

    def __init__(self, options: Skypilot) -> None:
        self.options = options
        self._server: SkypilotServer | None = None
        self._packed: tuple[str, str] | None = None

    @property
    def server(self) -> SkypilotServer:
        """The server, opened at its first use."""
        if self._server is None:
            self._server = SkypilotServer(self.options)
        return self._server

    def scope(self) -> str:
        return self.options.address.rstrip("/")

    async def check(self) -> Mapping[str, Any]:
        answer = await self.server.client.read_json("/api/health")
        if answer.get("status") != "healthy":
            raise ProviderError("auth", f"the server says that it is {answer.get('status')!r}", where="skypilot")
        return {"skypilot": answer.get("version"), "api": answer.get("api_version")}

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", poll=(10.0, 60.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Pack the parcel, so that problems are reported before anything is sent."""
        self._task(job)
        if self.options.bucket is not None:
            return ()
        message = f"no bucket is named: unless the image mounts storage at {self.options.folder}, results are lost"
        return [Finding(level="warning", rule="bucket", where="provider.bucket", message=message)]

    def _task(self, job: JobSpec) -> str:
        if self._packed is None or self._packed[0] != job.id:
            name = name_job(job.id)
            folder = result_folder(self.options, name)
            parcel = pack_parcel(job, folder, self.options.nproc_per_node)
            variables = parcel_variables(parcel.content, LARGEST)
            self._packed = job.id, describe_task(name, self.options, variables, parcel.packages)
        return self._packed[1]

    async def estimate(self, job: JobSpec, uploads: Mapping[str, str]) -> CostEstimate:
        """Return the price of the machine that SkyPilot would choose. No rows are sent, and nothing is made.

        Raises `unsupported` if no cloud has such a machine.
        """
        dag = describe_task(name_job(job.id), self.options, {}, [])
        id = await self.server.begin("/optimize", {"dag": dag, "minimize": 0, "request_options": None}, repeatable=True)
        await self.server.result(id)
        given = {"request_id": id, "follow": "false", "format": "plain"}
        return read_plan(await self.server.read_text("/api/stream", params=given), self.options)

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Begin the launch, and wait until the server has a number for the job."""
        name = name_job(job.id)
        id = await self.server.begin("/jobs/launch", {"task": self._task(job), "name": name}, repeatable=False)
        made = await self.server.result(id)
        number = made.get("job_id") if isinstance(made, dict) else None
        number = number[0] if isinstance(number, list) and number else number
        if not isinstance(number, int):
            raise ProviderError("protocol", "the launch ended without a job", where="skypilot: /jobs/launch")
        return JobStatus(remote_id=str(number), state=JobState.PENDING, raw_state="PENDING")

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Return the jobs of this name. A launch that has not ended is waited for."""
        name = name_job(job.id)
        found = await self._named(name)
        if found:
            return found
        for id, kind, body in await self.server.active_requests():
            if kind.endswith("jobs.launch") and body.get("name") == name:
                try:
                    await self.server.result(id)
                except ProviderError as error:
                    if error.kind in ("network", "lost"):
                        raise
        return await self._named(name)

    async def _named(self, name: str) -> list[JobStatus]:
        records = await self._read_queue({"name_match": name, "page": 1, "limit": PAGE})
        return [read_record(item, self.options) for item in records if item.get("job_name") == name]

    async def _read_queue(self, wanted: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return records of the queue. A server that never had a job has no queue."""
        body = {"refresh": False, "all_users": True, "fields": [*FIELDS], **wanted}
        try:
            answer = await self.server.read("/jobs/queue/v2", body)
        except ProviderError as error:
            if error.kind == "not_found":
                return []
            raise
        records = answer.get("jobs") if isinstance(answer, dict) else answer
        if not isinstance(records, list):
            raise ProviderError("protocol", "the answer is no queue", where="skypilot: /jobs/queue/v2")
        return records

    async def status(self, remote_id: str) -> JobStatus:
        """Return the status. The reason of a failure is read from the output, if it exists."""
        records = await self._read_queue({"job_ids": [int(remote_id)]})
        if not records:
            raise ProviderError("not_found", f"the server has no job {remote_id}", where="skypilot")
        status = read_record(records[0], self.options)
        if status.state != JobState.FAILED:
            return status
        try:
            output = await self._read_output(remote_id)
        except ProviderError as error:
            return attrs.evolve(status, reason=f"{status.reason}; its output cannot be read: {error.problem}")
        return status if output.reason is None else attrs.evolve(status, reason=output.reason)

    async def cancel(self, remote_id: str) -> None:
        """Cancel the job. It is no error if it ends meanwhile."""
        if (await self.status(remote_id)).state.is_final:
            return
        id = await self.server.begin("/jobs/cancel", {"job_ids": [int(remote_id)]}, repeatable=True)
        try:
            await self.server.result(id)
        except ProviderError:
            if not (await self.status(remote_id)).state.is_final:
                raise

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Return the newest of our jobs, which are known by their names."""
        ours: list[JobStatus] = []
        page = 1
        while len(ours) < limit:
            wanted = {"name_match": NAMED, "page": page, "limit": PAGE, "sort_by": "job_id", "sort_order": "desc"}
            records = await self._read_queue(wanted)
            ours += [read_record(item, self.options) for item in records if str(item.get("job_name")).startswith(NAMED)]
            if len(records) < PAGE:
                break
            page += 1
        return ours[:limit]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        output = await self._read_output(remote_id)
        return EventPage(events=output.events[int(cursor or 0) :], cursor=str(len(output.events)))

    async def _read_output(self, remote_id: str) -> ToldRun:
        text = await self.server.read_text("/jobs/logs", body={"job_id": int(remote_id), "follow": False})
        return read_told(text.splitlines())

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        """Return the path of the results in the folder for jobs, which the server cannot read."""
        status = await self.status(remote_id)
        if status.result_model is None:
            return ()
        return [JobArtifact(kind="hosted", name=status.result_model, downloadable=False)]

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        place = f"in {self.options.bucket}, mounted" if self.options.bucket else "on its machine"
        raise ProviderError("unsupported", f"the results stay {place} at {artifact.name}", where="skypilot")

    async def close(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.close()
