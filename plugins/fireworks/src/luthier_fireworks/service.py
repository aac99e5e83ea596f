"""Jobs at Fireworks AI: the request of each method of a provider."""

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
    JobEvent,
    JobSpec,
    JobState,
    JobStatus,
    LuthierError,
    ProviderError,
    Secret,
    ServiceClient,
    ServiceRow,
    Wanted,
    download_file,
    drop_missing,
    get_logger,
    place_inside,
    read_pages,
    read_secret,
    wire_row,
)

from luthier_fireworks import Fireworks
from luthier_fireworks.answers import read_job, read_metrics, state_event, tuned_model
from luthier_fireworks.datasets import has_dataset, send_dataset
from luthier_fireworks.offer import COLLECTIONS, describe_offer, loss_fields, training_fields

log = get_logger()
ACCOUNT: Final = "FIREWORKS_ACCOUNT_ID"
PAGE: Final = 200
KINDS: Final = tuple(dict.fromkeys(kind for kind, _ in COLLECTIONS.values()))


class FireworksService:
    """The provider. It opens no connection, and reads no key, before the first request."""

    def __init__(self, options: Fireworks) -> None:
        self.options = options
        self._address = options.base_url.rstrip("/").removesuffix("/v1")
        self._client: ServiceClient | None = None
        self._key: Secret | None = None

    def scope(self) -> str:
        return f"{self._address}#{self._named_account or 'no account'}"

    @property
    def _named_account(self) -> str:
        """Return the account id from the options or the environment, or an empty text."""
        return self.options.account or os.environ.get(ACCOUNT, "")

    @property
    def account(self) -> str:
        """Return the account id. Raises `credential-missing` if none is named."""
        if not self._named_account:
            remedy = f"Set provider.account, or run: export {ACCOUNT}=..."
            raise LuthierError("credential-missing", "no account is named", where="fireworks.account", remedy=remedy)
        return self._named_account

    @property
    def client(self) -> ServiceClient:
        """The client, created at its first use."""
        if self._client is None:
            self._client = ServiceClient(self._address, service="fireworks", headers=self._headers)
        return self._client

    def _headers(self) -> Mapping[str, str | Secret]:
        if self._key is None:
            self._key = read_secret(self.options.api_key, "fireworks.api_key")
        return {"authorization": self._key.with_prefix("Bearer ")}

    async def check(self) -> Mapping[str, Any]:
        account = await self.client.read_json(f"/v1/accounts/{self.account}")
        return drop_missing(account=account.get("name"), state=account.get("state"))

    async def capabilities(self, model: str) -> Capabilities:
        return describe_offer()

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        beta, findings = job.settings.get("loss.beta"), []
        if not job.model.startswith("accounts/"):
            message = f"write the service's own name, such as accounts/fireworks/models/{job.model.rpartition('/')[2]}"
            findings.append(Finding(level="error", rule="model", where="model", message=message))
        if beta is not None and not 0 < beta < 0.5:
            findings.append(_refusal("loss.beta", "must be above 0 and below 0.5"))
        if job.method != "sft" and "validation" in job.files:
            findings.append(_refusal("data.validation", f"a {job.method} job takes no validation rows"))
        if self.options.early_stop and (job.method != "sft" or "validation" not in job.files):
            findings.append(_refusal("provider.early_stop", "needs an sft job with validation rows"))
        return findings

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        return wire_row(row, weights=True)

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Any) -> str:
        if known is not None and await has_dataset(self.client, known):
            return known
        return await send_dataset(self.client, self.account, file, progress)

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        kind, named = COLLECTIONS[job.method]
        path = f"/v1/accounts/{self.account}/{kind}?{named}={_job_id(job)}"
        return read_job(await self.client.post_json(path, self.request_body(job, uploads)))

    def request_body(self, job: JobSpec, uploads: Mapping[str, str]) -> dict[str, Any]:
        """Return the request that creates the job. It contains only what the user set."""
        suffix, account = self.options.suffix, self.account
        training = {
            **training_fields(job.model, job.settings),
            **drop_missing(
                outputModel=None if suffix is None else f"accounts/{account}/models/{suffix}-{job.token}",
                samplerCheckpointSaveIntervalSteps=self.options.checkpoint_steps,
            ),
        }
        if job.method != "sft":
            loss = loss_fields(job.method, job.settings)
            return {"dataset": uploads["training"], "trainingConfig": training, "lossConfig": loss}
        more = drop_missing(evaluationDataset=uploads.get("validation"), earlyStop=self.options.early_stop)
        return {"dataset": uploads["training"], **training, **more}

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Look up the job by the name that its request gave it."""
        try:
            return [await self.status(f"accounts/{self.account}/{COLLECTIONS[job.method][0]}/{_job_id(job)}")]
        except ProviderError as error:
            if error.kind == "not_found":
                return []
            raise

    async def status(self, remote_id: str) -> JobStatus:
        return read_job(await self._job(remote_id))

    async def _job(self, remote_id: str) -> Mapping[str, Any]:
        job: Mapping[str, Any] = await self.client.read_json(f"/v1/{remote_id}")
        return job

    async def cancel(self, remote_id: str) -> None:
        await self.client.post_json(f"/v1/{remote_id}:cancel", {}, repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Read all jobs of both kinds, because the service promises no order, and return the newest."""
        jobs = [
            read_job(item)
            for kind in KINDS
            async for item in read_pages(
                self.client, f"/v1/accounts/{self.account}/{kind}", kind, params={"pageSize": PAGE}
            )
        ]
        return sorted(jobs, key=lambda job: job.created or 0.0, reverse=True)[:limit]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return events made from the state of the job and its metrics file. The store drops known ones."""
        job = await self._job(remote_id)
        state = state_event(job)
        link = await self._metrics_link(remote_id, job)
        metrics = [] if link is None else await self._read_metrics(link, state.at)
        return EventPage(events=[*metrics, state], cursor=cursor)

    async def _metrics_link(self, remote_id: str, job: Mapping[str, Any]) -> str | None:
        """Return the signed link of the metrics file, or None before there is one. Preference jobs must be asked."""
        if "/dpoJobs/" not in remote_id:
            return job.get("metricsFileSignedUrl") or None
        try:
            endpoint = await self.client.read_json(f"/v1/{remote_id}:getMetricsFileEndpoint")
        except ProviderError as error:
            if error.kind in ("not_found", "invalid"):  # the file does not exist yet
                return None
            raise
        return endpoint.get("signedUrl") or None

    async def _read_metrics(self, link: str, at: float) -> Sequence[JobEvent]:
        try:
            async with self.client.open_stream(link, bare=True) as opened:
                text = b"".join([block async for block in opened.blocks()]).decode("utf-8", "replace")
        except ProviderError as error:
            if error.is_passing:
                raise
            log.warning("the metrics file cannot be read", service="fireworks", error=error.line)
            return []
        return list(read_metrics(text, at))

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        job = await self._job(remote_id)
        if read_job(job).state != JobState.COMPLETED:
            return []
        name, base = tuned_model(job), read_base(job)
        output = [
            JobArtifact(kind="adapter", name=name, base_model=base, format="peft", locator={"model": name}),
            JobArtifact(kind="hosted", name=name, base_model=base, downloadable=False),
        ]
        if await self._metrics_link(remote_id, job) is not None:
            output.append(JobArtifact(kind="metrics", name="metrics.jsonl", format="jsonl", locator={"job": remote_id}))
        return output

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        links = await self._links(artifact)
        return [await self._fetch_one(name, links[name], artifact, folder, progress) for name in sorted(links)]

    async def _links(self, artifact: JobArtifact) -> Mapping[str, str]:
        """Return fresh signed links of an artifact's files, by name."""
        if "job" in artifact.locator:
            link = await self._metrics_link(artifact.locator["job"], await self._job(artifact.locator["job"]))
            return {} if link is None else {artifact.name: link}
        endpoint = await self.client.read_json(f"/v1/{artifact.locator['model']}:getDownloadEndpoint")
        return endpoint.get("filenameToSignedUrls") or {}

    async def _fetch_one(self, name: str, link: str, artifact: JobArtifact, folder: Path, progress: Any) -> Path:
        async def renew() -> str:
            return (await self._links(artifact))[name]

        target = place_inside(folder, name)
        wanted = Wanted(address=link, bare=True, renew=renew)
        await download_file(self.client, wanted, target, progress)
        return target

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def read_base(job: Mapping[str, Any]) -> str | None:
    """Return the base model in a job of either kind."""
    return job.get("baseModel") or (job.get("trainingConfig") or {}).get("baseModel")


def _job_id(job: JobSpec) -> str:
    """Return the name of the job at the service. It finds the job if the answer to its creation is lost."""
    return f"luthier-{job.token}"


def _refusal(where: str, message: str) -> Finding:
    return Finding(level="error", rule="setting", where=where, message=message)
