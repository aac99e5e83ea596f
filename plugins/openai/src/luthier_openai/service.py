"""Jobs in OpenAI's wire format: what each act of a provider asks of the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
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
    JobStatus,
    ProviderError,
    Secret,
    ServiceClient,
    ServiceRow,
    SettingRule,
    Wanted,
    download_file,
    read_secret,
    wire_row,
)

from luthier_openai import OpenAI
from luthier_openai.answers import read_event, read_job
from luthier_openai.dialects import choose_dialect

JOBS: Final = "/fine_tuning/jobs"
TAG: Final = "luthier_job"  # the metadata by which a job is found whose answer was lost
PAGE: Final = 100
PAGES: Final = 200  # of a list that does not end
METHODS: Final = {"sft": "supervised", "dpo": "dpo"}
SETTINGS: Final = {
    "num_train_epochs": SettingRule(low=1, high=50, whole=True),
    "global_batch_size": SettingRule(low=1, high=256, whole=True),
    "seed": SettingRule(low=0, whole=True),
    "loss.beta": SettingRule(low=0.0, high=2.0, methods=("dpo",)),
    "adapter.name": SettingRule(remark="is not sent: the service decides how it trains"),
}
INSTEAD: Final = {
    "learning_rate": "It only scales its own rate: set provider.learning_rate_multiplier.",
    "max_steps": "Set num_train_epochs.",
    "adapter.r": "It decides how it trains: leave the adapter's options out.",
}


class OpenAIService:
    """The provider. No connection is opened, and no key read, before the first request."""

    def __init__(self, options: OpenAI) -> None:
        self.options, self.dialect = options, choose_dialect(options)
        self._client: ServiceClient | None = None
        self._key: Secret | None = None

    def scope(self) -> str:
        account = "/".join(filter(None, (self.options.organization, self.options.project)))
        return f"{self.options.base_url.rstrip('/')}#{account}" if account else self.options.base_url.rstrip("/")

    @property
    def client(self) -> ServiceClient:
        """The client, made when it is first used."""
        if self._client is None:
            self._client = ServiceClient(self.options.base_url, service="openai", headers=self._headers)
        return self._client

    def _headers(self) -> Mapping[str, str | Secret]:
        if self._key is None:
            self._key = read_secret(self.options.api_key, "openai.api_key")
        headers: dict[str, str | Secret] = {self.dialect.key_header: self._key.with_prefix(self.dialect.key_prefix)}
        for name, value in (
            ("openai-organization", self.options.organization),
            ("openai-project", self.options.project),
        ):
            if value:
                headers[name] = value
        return headers

    def _params(self, **given: Any) -> dict[str, Any]:
        version = {"api-version": self.options.api_version} if self.options.api_version else {}
        return {**version, **{name: value for name, value in given.items() if value is not None}}

    def _path(self, path: str) -> str:
        """A path that is not read from, with what the address wants of every request."""
        return f"{path}?api-version={self.options.api_version}" if self.options.api_version else path

    async def check(self) -> Mapping[str, Any]:
        found = await self.client.read_json("/models", self._params())
        return {"models": len(found.get("data") or []), "dialect": self.dialect.name}

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(
            methods=tuple(METHODS),
            settings=SETTINGS,
            rules=self.dialect.rules,
            prices=self.dialect.prices,
            known_models=self.dialect.models,
            notices=self.dialect.notices,
            instead=INSTEAD,
        )

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        if job.settings.get("loss.beta") == 0:
            return [Finding(level="error", rule="setting", where="loss.beta", message="must be above 0")]
        return ()

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        return wire_row(row, weights=True)

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Any) -> str:
        if known is not None and await self._has_file(known):
            return known
        fields = {"purpose": "fine-tune"}
        name = f"{job.id}-{file.path.name}"
        found = await self.client.send_file(
            self._path("/files"), file.path, fields=fields, name=name, progress=progress
        )
        return str(found["id"])

    async def _has_file(self, id: str) -> bool:
        try:
            found = await self.client.read_json(f"/files/{id}", self._params())
        except ProviderError as error:
            if error.kind == "not_found":
                return False
            raise
        return found.get("status") != "error"

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        return read_job(await self.client.post_json(self._path(JOBS), self.request_body(job, uploads)))

    def request_body(self, job: JobSpec, uploads: Mapping[str, str]) -> dict[str, Any]:
        """Return the request that makes the job; only what was set stands in it."""
        settings = job.settings
        numbers = {
            "n_epochs": settings.get("num_train_epochs"),
            "batch_size": settings.get("global_batch_size"),
            "beta": settings.get("loss.beta"),
            "learning_rate_multiplier": self.options.learning_rate_multiplier,
        }
        given = {name: int(v) if name == "n_epochs" else v for name, v in numbers.items() if v is not None}
        method = METHODS[job.method]
        body: dict[str, Any] = {
            "model": job.model,
            "training_file": uploads["training"],
            "method": {"type": method, method: {"hyperparameters": given}} if given else {"type": method},
            "metadata": {TAG: job.id},
            **self.dialect.extra,
        }
        optional = {"validation_file": uploads.get("validation"), "suffix": self.options.suffix,
                    "seed": job.settings.get("seed")}  # fmt: skip
        return body | {name: value for name, value in optional.items() if value is not None}

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Ask for jobs with this one's metadata; a service that ignores the filter is read through."""
        found = []
        async for item in self._pages(JOBS, {f"metadata[{TAG}]": job.id}):
            if (item.get("metadata") or {}).get(TAG) == job.id:
                found.append(read_job(item))
        return found

    async def status(self, remote_id: str) -> JobStatus:
        return read_job(await self.client.read_json(f"{JOBS}/{remote_id}", self._params()))

    async def cancel(self, remote_id: str) -> None:
        await self.client.post_json(self._path(f"{JOBS}/{remote_id}/cancel"), repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        found: list[JobStatus] = []
        async for item in self._pages(JOBS):
            found.append(read_job(item))
            if len(found) >= limit:
                break
        return found

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Read from the newest event back to the one that was read last."""
        found: list[JobEvent] = []
        async for item in self._pages(f"{JOBS}/{remote_id}/events"):
            event = read_event(item)
            if event.id == cursor:
                break
            found.append(event)
        return EventPage(events=found[::-1], cursor=found[0].id if found else cursor)

    async def _pages(self, path: str, given: Mapping[str, Any] | None = None) -> AsyncIterator[Mapping[str, Any]]:
        """Give the items of a list, page by page; a service that repeats itself is a `protocol` error."""
        after: str | None = None
        seen: set[str] = set()
        for _ in range(PAGES):
            page = await self.client.read_json(path, self._params(limit=PAGE, after=after, **(given or {})))
            items = page.get("data") or []
            ids = {str(item.get("id")) for item in items}
            if items and ids <= seen:
                raise ProviderError("protocol", "the list repeats itself", where=f"openai: GET {path}")
            seen |= ids
            for item in items:
                yield item
            if not items or not page.get("has_more"):
                return
            after = str(items[-1].get("id"))
        raise ProviderError("protocol", f"the list did not end after {PAGES} pages", where=f"openai: GET {path}")

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        job = await self.client.read_json(f"{JOBS}/{remote_id}", self._params())
        base, found = job.get("model"), []
        if job.get("fine_tuned_model"):
            found.append(JobArtifact(kind="hosted", name=job["fine_tuned_model"], base_model=base, downloadable=False))
        for number, id in enumerate(job.get("result_files") or []):
            found.append(JobArtifact(kind="metrics", name=f"metrics-{number}.csv", format="csv", locator={"file": id}))
        async for item in self._pages(f"{JOBS}/{remote_id}/checkpoints"):
            name, step = item["fine_tuned_model_checkpoint"], item.get("step_number")
            found.append(JobArtifact(kind="checkpoint", name=name, base_model=base, step=step, downloadable=False))
        return found

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        target = folder / artifact.name
        wanted = Wanted(address=f"/files/{artifact.locator['file']}/content", params=self._params())
        await download_file(self.client, wanted, target, progress)
        return [target]

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
