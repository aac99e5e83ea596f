"""Jobs at Amazon Bedrock: the request of each method of a provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from luthier import (
    Capabilities,
    DataFile,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobState,
    JobStatus,
    ProviderError,
    ServiceClient,
    ServiceRow,
    drop_missing,
    read_pages,
)

from luthier_bedrock import Bedrock
from luthier_bedrock.answers import phase_events, read_job, read_metrics
from luthier_bedrock.offer import conversation_row, describe_offer, family_of, hyper_parameters
from luthier_bedrock.signing import Keys
from luthier_bedrock.storage import Storage

JOBS: Final = "/model-customization-jobs"
PAGE: Final = 100
METRICS: Final = ("step_wise_training_metrics.csv", "validation_metrics.csv")


class BedrockService:
    """The provider. No connection is opened, and no key read, before the first request.

    A job is identified by its name, which this provider chooses; its ARN is accepted too.
    """

    def __init__(self, options: Bedrock) -> None:
        self.options, self.keys = options, Keys(options)
        self._client: ServiceClient | None = None

    def scope(self) -> str:
        owner = self.options.profile or self.options.access_key_id
        region = self.keys.given_region or "no region"
        address = (self.options.base_url or f"https://bedrock.{region}.amazonaws.com").rstrip("/")
        return f"{address}#{owner}" if owner else address

    @property
    def _address(self) -> str:
        return (self.options.base_url or f"https://bedrock.{self.keys.region}.amazonaws.com").rstrip("/")

    async def _ready(self) -> ServiceClient:
        """Return the client, with valid keys."""
        await self.keys.refresh()
        if self._client is None:
            self._client = ServiceClient(self._address, service="bedrock", signer=self.keys.sign)
        return self._client

    async def _storage(self) -> Storage:
        return Storage(client=await self._ready(), keys=self.keys, address=self.options.s3_url)

    async def check(self) -> Mapping[str, Any]:
        answer = await (await self._ready()).read_json(JOBS, {"maxResults": 1})
        return {"region": self.keys.region, "jobs": bool(answer.get("modelCustomizationJobSummaries"))}

    async def capabilities(self, model: str) -> Capabilities:
        return describe_offer(model)

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        needed = {"role_arn": "the role for Bedrock", "s3_folder": "the S3 folder for rows and results"}
        findings = [
            _refusal(f"provider.{name}", f"{meaning} must be named")
            for name, meaning in needed.items()
            if getattr(self.options, name) is None
        ]
        if self.options.learning_rate_multiplier is not None and not family_of(job.model).multiplier:
            findings.append(_refusal("provider.learning_rate_multiplier", "this model takes learning_rate instead"))
        return findings

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        return conversation_row(row)

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Any) -> str:
        """Write the rows into the user's bucket, under a name that is a hash of their bytes."""
        storage, uri = await self._storage(), f"{self._folder}/rows/{file.sha256}.jsonl"
        if known != uri or not await storage.has_object(uri):
            await storage.send_file(uri, file, progress)
        return uri

    @property
    def _folder(self) -> str:
        return str(self.options.s3_folder).rstrip("/")

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        client, body = await self._ready(), self.request_body(job, uploads)
        answer = await client.post_json(JOBS, body)
        if not answer.get("jobArn"):
            raise ProviderError("protocol", "the answer names no job", where=f"bedrock: POST {JOBS}")
        return read_job({"status": "InProgress", "statusDetails": {"trainingDetails": {"status": "NotStarted"}},
                         "jobName": body["jobName"], "jobArn": answer["jobArn"]})  # fmt: skip

    def request_body(self, job: JobSpec, uploads: Mapping[str, str]) -> dict[str, Any]:
        """Return the request that creates the job. It contains only what the user set."""
        hyper = hyper_parameters(job.settings, self.options.learning_rate_multiplier)
        checked = uploads.get("validation")
        return {
            "jobName": _job_name(job),
            "customModelName": f"{self.options.suffix or 'luthier'}-{job.token}",
            "roleArn": self.options.role_arn,
            "clientRequestToken": _job_name(job),
            "baseModelIdentifier": job.model,
            "customizationType": "FINE_TUNING",
            "trainingDataConfig": {"s3Uri": uploads["training"]},
            "outputDataConfig": {"s3Uri": f"{self._folder}/jobs/{job.id}/"},
            **drop_missing(
                hyperParameters=hyper or None,
                validationDataConfig=None if checked is None else {"validators": [{"s3Uri": checked}]},
            ),
        }

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Look up the job by the name that its request gave it."""
        try:
            return [await self.status(_job_name(job))]
        except ProviderError as error:
            if error.kind == "not_found":
                return []
            raise

    async def status(self, remote_id: str) -> JobStatus:
        return read_job(await self._job(remote_id))

    async def _job(self, remote_id: str) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = await (await self._ready()).read_json(f"{JOBS}/{quote(remote_id, safe='')}")
        return answer

    async def cancel(self, remote_id: str) -> None:
        client = await self._ready()
        await client.post_json(f"{JOBS}/{quote(remote_id, safe='')}/stop", repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        statuses = []
        params = {"maxResults": min(limit, PAGE), "sortBy": "CreationTime", "sortOrder": "Descending"}
        pages = read_pages(await self._ready(), JOBS, "modelCustomizationJobSummaries", token="nextToken",
                           asked="nextToken", params=params)  # fmt: skip
        async for item in pages:
            statuses.append(read_job(item))
            if len(statuses) >= limit:
                break
        return statuses

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return events made from the phases of the job and, when it is complete, from its metrics files."""
        job = await self._job(remote_id)
        job_events, status = list(phase_events(job)), read_job(job)
        if status.state == JobState.COMPLETED:
            storage, at = await self._storage(), status.finished or 0.0
            for artifact in await self._metrics(job, storage):
                text = await storage.read_text(artifact.locator["uri"])
                job_events += read_metrics(text, artifact.name, at)
        return EventPage(events=job_events, cursor=cursor)

    async def _metrics(self, job: Mapping[str, Any], storage: Storage) -> Sequence[JobArtifact]:
        """Return the metrics files that the service wrote below the output folder of the job."""
        output = str((job.get("outputDataConfig") or {}).get("s3Uri") or "")
        objects = [item async for item in storage.list_objects(output)] if output else []
        own = str(job.get("jobArn")).rpartition("/")[2]  # several jobs may write into one folder
        mine = [item for item in objects if own in item.uri or _job_folder(job) in item.uri]
        return [
            JobArtifact(kind="metrics", name=name, format="csv", size=item.size, locator={"uri": item.uri})
            for item in mine
            if (name := item.uri.rpartition("/")[2]) in METRICS
        ]

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        job = await self._job(remote_id)
        status = read_job(job)
        if status.state != JobState.COMPLETED or status.result_model is None:
            return []
        base = str(job.get("baseModelArn")).rpartition("/")[2]
        hosted = JobArtifact(kind="hosted", name=status.result_model, base_model=base, downloadable=False)
        return [hosted, *await self._metrics(job, await self._storage())]

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        target = folder / artifact.name
        await (await self._storage()).fetch_file(artifact.locator["uri"], target, progress)
        return [target]

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def _job_name(job: JobSpec) -> str:
    """Return the name of the job at the service. It finds the job if the answer to its creation is lost."""
    return f"luthier-{job.token}"


def _job_folder(job: Mapping[str, Any]) -> str:
    """Return the last part of the output folder of a job, which no other job uses."""
    return str(job["jobName"]).removeprefix("luthier-") + "/"


def _refusal(where: str, message: str) -> Finding:
    return Finding(level="error", rule="setting", where=where, message=message)
