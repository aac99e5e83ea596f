"""Jobs in OpenAI's wire format: what each method of a provider asks of a service that uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.jobs.answer_values import drop_missing
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.rows.service_rows import wire_row
from luthier.jobs.secret import Secret
from luthier.jobs.transport.file_download import Wanted, download_file
from luthier.jobs.transport.service_client import ServiceClient
from luthier.jobs.wire.part_upload import send_in_parts
from luthier.jobs.wire.wire_answers import read_wire_event, read_wire_job
from luthier.plugins.providing.job_records import (
    Capabilities,
    DataFile,
    EventPage,
    Finding,
    JobArtifact,
    JobEvent,
    JobSpec,
    JobStatus,
    Progress,
    ServiceRow,
)

JOBS: Final = "/fine_tuning/jobs"
TAG: Final = "luthier_job"  # the metadata by which a job whose answer was lost is found
PAGE: Final = 100
PAGES: Final = 200  # the most pages of one list
METHODS: Final = {"sft": "supervised", "dpo": "dpo"}


@attrs.frozen(kw_only=True)
class WireTerms:
    """One service's use of the format. `headers` returns what identifies the user, with a `Secret` for the key.

    `params` go with every request, `extra` is part of each request for a job, and `hyperparameters` are those that the
    recipe has no name for.
    """

    service: str  # for errors
    base_url: str
    headers: Callable[[], Mapping[str, str | Secret]]
    capabilities: Capabilities
    scope: str
    dialect: str = "compatible"
    params: Mapping[str, str] = attrs.field(factory=dict)
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    hyperparameters: Mapping[str, Any] = attrs.field(factory=dict)
    suffix: str | None = None
    whole_bytes: int | None = None  # larger files are sent in parts; None: the service takes no parts
    part_bytes: int = 64_000_000
    findings: Sequence[Finding] = ()  # problems of the options, reported before anything is sent


class WireService:
    """The provider of a service that uses the format. No connection is opened before the first request."""

    def __init__(self, terms: WireTerms) -> None:
        self.terms = terms
        self._client: ServiceClient | None = None

    def scope(self) -> str:
        return self.terms.scope

    @property
    def client(self) -> ServiceClient:
        """Return the client, which is made at its first use."""
        if self._client is None:
            terms = self.terms
            self._client = ServiceClient(terms.base_url, service=terms.service, headers=terms.headers)
        return self._client

    def _params(self, **given: Any) -> dict[str, Any]:
        return {**self.terms.params, **drop_missing(**given)}

    def _path(self, path: str) -> str:
        """Return a path for a request other than a read, with the parameters that go with every request."""
        words = "&".join(f"{name}={value}" for name, value in self.terms.params.items())
        return f"{path}?{words}" if words else path

    async def check(self) -> Mapping[str, Any]:
        models = await self.client.read_json("/models", self._params())
        return {"models": len(models.get("data") or []), "dialect": self.terms.dialect}

    async def capabilities(self, model: str) -> Capabilities:
        return self.terms.capabilities

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        return self.terms.findings

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        return wire_row(row, weights=True)

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Progress | None) -> str:
        if known is not None and await self._has_file(known):
            return known
        name = f"{job.id}-{file.path.name}"
        if self.terms.whole_bytes is not None and file.size > self.terms.whole_bytes:
            note, size = job.folder / f"parts-{file.role}.json", self.terms.part_bytes
            return await send_in_parts(
                self.client, self._path, file, note=note, name=name, size=size, progress=progress
            )
        fields = {"purpose": "fine-tune"}
        uploaded = await self.client.send_file(
            self._path("/files"), file.path, fields=fields, name=name, progress=progress
        )
        return str(uploaded["id"])

    async def _has_file(self, id: str) -> bool:
        try:
            uploaded = await self.client.read_json(f"/files/{id}", self._params())
        except ProviderError as error:
            if error.kind == "not_found":
                return False
            raise
        return uploaded.get("status") != "error"

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        return read_wire_job(await self.client.post_json(self._path(JOBS), self.request_body(job, uploads)))

    def request_body(self, job: JobSpec, uploads: Mapping[str, str]) -> dict[str, Any]:
        """Return the request that makes the job. It holds only what was set."""
        settings = job.settings
        numbers = {
            "n_epochs": settings.get("num_train_epochs"),
            "batch_size": settings.get("global_batch_size"),
            "beta": settings.get("loss.beta"),
            **self.terms.hyperparameters,
        }
        given = {name: int(v) if name == "n_epochs" else v for name, v in numbers.items() if v is not None}
        method = METHODS[job.method]
        body: dict[str, Any] = {
            "model": job.model,
            "training_file": uploads["training"],
            "method": {"type": method, method: {"hyperparameters": given}} if given else {"type": method},
            "metadata": {TAG: job.id},
            **self.terms.extra,
        }
        optional = {"validation_file": uploads.get("validation"), "suffix": self.terms.suffix,
                    "seed": job.settings.get("seed")}  # fmt: skip
        return body | {name: value for name, value in optional.items() if value is not None}

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Return the jobs with this one's metadata. If the service ignores the filter, all its jobs are read."""
        statuses = []
        async for item in self._pages(JOBS, {f"metadata[{TAG}]": job.id}):
            if (item.get("metadata") or {}).get(TAG) == job.id:
                statuses.append(read_wire_job(item))
        return statuses

    async def status(self, remote_id: str) -> JobStatus:
        return read_wire_job(await self.client.read_json(f"{JOBS}/{remote_id}", self._params()))

    async def cancel(self, remote_id: str) -> None:
        await self.client.post_json(self._path(f"{JOBS}/{remote_id}/cancel"), repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        statuses: list[JobStatus] = []
        async for item in self._pages(JOBS):
            statuses.append(read_wire_job(item))
            if len(statuses) >= limit:
                break
        return statuses

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Read from the newest event back to the one that was read last."""
        events: list[JobEvent] = []
        async for item in self._pages(f"{JOBS}/{remote_id}/events"):
            event = read_wire_event(item)
            if event.id == cursor:
                break
            events.append(event)
        return EventPage(events=events[::-1], cursor=events[0].id if events else cursor)

    async def _pages(self, path: str, given: Mapping[str, Any] | None = None) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the items of a list, page by page. Raises a `protocol` error if the service repeats itself."""
        where, after = f"{self.terms.service}: GET {path}", None
        seen: set[str] = set()
        for _ in range(PAGES):
            page = await self.client.read_json(path, self._params(limit=PAGE, after=after, **(given or {})))
            items = page.get("data") or []
            ids = {str(item.get("id")) for item in items}
            if items and ids <= seen:
                raise ProviderError("protocol", "the list repeats itself", where=where)
            seen |= ids
            for item in items:
                yield item
            if not items or not page.get("has_more"):
                return
            after = str(items[-1].get("id"))
        raise ProviderError(
            "protocol", f"the list did not end after {PAGES} pages", where=f"{self.terms.service}: GET {path}"
        )

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        job = await self.client.read_json(f"{JOBS}/{remote_id}", self._params())
        base, artifacts = job.get("model"), []
        if job.get("fine_tuned_model"):
            artifacts.append(
                JobArtifact(kind="hosted", name=job["fine_tuned_model"], base_model=base, downloadable=False)
            )
        for number, id in enumerate(job.get("result_files") or []):
            artifacts.append(
                JobArtifact(kind="metrics", name=f"metrics-{number}.csv", format="csv", locator={"file": id})
            )
        async for item in self._pages(f"{JOBS}/{remote_id}/checkpoints"):
            name, step = item["fine_tuned_model_checkpoint"], item.get("step_number")
            artifacts.append(JobArtifact(kind="checkpoint", name=name, base_model=base, step=step, downloadable=False))
        return artifacts

    async def download(self, artifact: JobArtifact, folder: Path, progress: Progress | None) -> Sequence[Path]:
        target = folder / artifact.name
        wanted = Wanted(address=f"/files/{artifact.locator['file']}/content", params=self._params())
        await download_file(self.client, wanted, target, progress)
        return [target]

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
