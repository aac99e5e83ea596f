"""Jobs at Vertex AI: the request of each method of a provider."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from luthier import (
    Capabilities,
    DataFile,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobState,
    JobStatus,
    LuthierError,
    ProviderError,
    ServiceClient,
    ServiceRow,
    drop_missing,
    place_inside,
    read_pages,
)

from luthier_vertex import Vertex
from luthier_vertex.access import AccessToken
from luthier_vertex.answers import job_events, read_job
from luthier_vertex.offer import MODES, SPECS, describe_offer, gemini_row, hyper_parameters, is_open
from luthier_vertex.storage import fetch_object, has_object, list_objects, send_object, split_uri

READING: Final = "v1beta1"  # unlike v1 it reports the phase of a job
LABEL: Final = "luthier_job"  # label that finds a job if the answer to its creation is lost
PAGE: Final = 100
NAMES: Final = {"project": "GOOGLE_CLOUD_PROJECT", "location": "GOOGLE_CLOUD_LOCATION"}


class VertexService:
    """The provider. It opens no connection, and asks for no token, before the first request."""

    def __init__(self, options: Vertex) -> None:
        self.options, self.token = options, AccessToken(options.access_token)
        self._clients: dict[str, ServiceClient] = {}

    def scope(self) -> str:
        """Return the address of the project. A missing name is reported at the first request."""
        project, location = (self._given(name) or f"no {name}" for name in NAMES)
        address = self.options.base_url or f"https://{location}-aiplatform.googleapis.com"
        return f"{address.rstrip('/')}#projects/{project}/locations/{location}"

    @property
    def _address(self) -> str:
        return (self.options.base_url or f"https://{self._named('location')}-aiplatform.googleapis.com").rstrip("/")

    @property
    def _parent(self) -> str:
        return f"projects/{self._named('project')}/locations/{self._named('location')}"

    def _given(self, name: str) -> str:
        """Return project or location, from the options or the environment, or an empty text."""
        return str(getattr(self.options, name) or os.environ.get(NAMES[name], ""))

    def _named(self, name: str) -> str:
        value = self._given(name)
        if not value:
            remedy = f"Set provider.{name}, or run: export {NAMES[name]}=..."
            raise LuthierError("credential-missing", f"no {name} is named", where=f"vertex.{name}", remedy=remedy)
        return value

    async def _ready(self, address: str | None = None) -> ServiceClient:
        """Return a client of the service, or of another address, with a valid token."""
        assert self._parent  # missing options are reported before a token is requested
        await self.token.refresh()
        address = address or self._address
        if address not in self._clients:
            self._clients[address] = ServiceClient(address, service="vertex", headers=self.token.headers)
        return self._clients[address]

    async def _storage(self) -> ServiceClient:
        return await self._ready(self.options.storage_url.rstrip("/"))

    async def check(self) -> Mapping[str, Any]:
        answer = await (await self._ready()).read_json(f"/{READING}/{self._parent}/tuningJobs", {"pageSize": 1})
        return {"parent": self._parent, "jobs": bool(answer.get("tuningJobs"))}

    async def capabilities(self, model: str) -> Capabilities:
        return describe_offer(model)

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        findings = []
        if self.options.gcs_folder is None:
            findings.append(_refusal("provider.gcs_folder", "the folder for rows and results must be named"))
        if is_open(job.model) and self.options.learning_rate_multiplier is not None:
            findings.append(_refusal("provider.learning_rate_multiplier", "an open model takes learning_rate instead"))
        return findings

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        return gemini_row(row)

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Any) -> str:
        """Write the rows into the user's bucket, under a name that is a hash of their bytes."""
        storage, uri = await self._storage(), f"{self._folder}/rows/{file.sha256}.jsonl"
        if known != uri or not await has_object(storage, uri):
            await send_object(storage, uri, file, progress)
        return uri

    @property
    def _folder(self) -> str:
        return str(self.options.gcs_folder).rstrip("/")

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        version = "v1beta1" if is_open(job.model) else "v1"
        path = f"/{version}/{self._parent}/tuningJobs"
        return read_job(await (await self._ready()).post_json(path, self.request_body(job, uploads)))

    def request_body(self, job: JobSpec, uploads: Mapping[str, str]) -> dict[str, Any]:
        """Return the request that creates the job. It contains only what the user set."""
        opened, adapter = is_open(job.model), job.settings.get("adapter.name")
        hyper = hyper_parameters(job.settings, self.options.learning_rate_multiplier)
        spec = drop_missing(
            trainingDatasetUri=uploads["training"],
            validationDatasetUri=uploads.get("validation"),
            hyperParameters=hyper or None,
            exportLastCheckpointOnly=self.options.last_checkpoint_only,
            tuningMode=MODES[adapter] if opened and adapter is not None else None,
        )
        return {
            "baseModel": job.model,
            SPECS[job.method]: spec,
            "tunedModelDisplayName": f"{self.options.suffix or 'luthier'}-{job.token}",
            "labels": {LABEL: job.token},
            **({"outputUri": f"{self._folder}/jobs/{job.id}"} if opened else {}),
        }

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Find jobs by this job's label. If the service ignores the filter, all jobs are read."""
        params = {"filter": f'labels.{LABEL}="{job.token}"', "pageSize": PAGE}
        pages = read_pages(await self._ready(), f"/{READING}/{self._parent}/tuningJobs", "tuningJobs", params=params)
        return [read_job(item) async for item in pages if (item.get("labels") or {}).get(LABEL) == job.token]

    async def status(self, remote_id: str) -> JobStatus:
        return read_job(await self._job(remote_id))

    async def _job(self, remote_id: str) -> Mapping[str, Any]:
        job: Mapping[str, Any] = await (await self._ready()).read_json(f"/{READING}/{remote_id}")
        return job

    async def cancel(self, remote_id: str) -> None:
        await (await self._ready()).post_json(f"/{READING}/{remote_id}:cancel", {}, repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Read all jobs, because the service promises no order, and return the newest."""
        pages = read_pages(
            await self._ready(), f"/{READING}/{self._parent}/tuningJobs", "tuningJobs", params={"pageSize": PAGE}
        )
        jobs = [read_job(item) async for item in pages]
        return sorted(jobs, key=lambda job: job.created or 0.0, reverse=True)[:limit]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        return EventPage(events=[*job_events(await self._job(remote_id))], cursor=cursor)

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        job = await self._job(remote_id)
        status, base = read_job(job), job.get("baseModel")
        if status.state != JobState.COMPLETED:
            return []
        artifacts = []
        for kind, uri in ((_weights_kind(job), job.get("outputUri")), ("metrics", job.get("gcsMetricsUri"))):
            if uri:
                artifacts.append(JobArtifact(kind=kind, name=kind, base_model=base, locator={"uri": uri}))
        if status.result_model is not None:
            artifacts.append(JobArtifact(kind="hosted", name=status.result_model, base_model=base, downloadable=False))
        for item in (job.get("tunedModel") or {}).get("checkpoints") or []:
            name = str(item.get("endpoint") or item.get("checkpointId"))
            step = int(item["step"]) if item.get("step") is not None else None
            artifacts.append(JobArtifact(kind="checkpoint", name=name, base_model=base, step=step, downloadable=False))
        return artifacts

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        """Download every object below the place of the artifact."""
        storage, uri = await self._storage(), str(artifact.locator["uri"])
        bucket, prefix = split_uri(uri.rstrip("/") + "/")
        files = []
        async for item in list_objects(storage, uri):
            if not str(item["name"]).endswith("/"):
                target = place_inside(folder, str(item["name"]).removeprefix(prefix))
                await fetch_object(storage, f"gs://{bucket}/{item['name']}", target, progress)
                files.append(target)
        if not files:
            raise ProviderError("not_found", f"there are no files in {uri}", where=f"vertex: {artifact.name}")
        return files

    async def close(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()


def _weights_kind(job: Mapping[str, Any]) -> str:
    """Return what the job of an open model writes: an adapter, unless it trained the whole model."""
    mode = (job.get(SPECS["sft"]) or {}).get("tuningMode")
    return "model" if mode == MODES["full"] else "adapter"


def _refusal(where: str, message: str) -> Finding:
    return Finding(level="error", rule="setting", where=where, message=message)
