"""Jobs at Together AI: the request of each method of a provider."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from luthier import (
    Call,
    Capabilities,
    CostEstimate,
    DataFile,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobStatus,
    ProviderError,
    Secret,
    ServiceClient,
    ServiceRow,
    Wanted,
    download_file,
    read_secret,
    unpack_archive,
    wire_row,
)

from luthier_together import Together
from luthier_together.answers import ARCHIVE, read_event, read_job, read_metrics
from luthier_together.offer import describe_offer, request_body

CHECKED: Final = ("COMPLETED", None)  # states of a file that may be used; None: the service does not say
CHECKING: Final = 120  # number of status requests for a file that the service is checking
PRICED: Final = ("model", "training_file", "validation_file", "n_epochs", "n_evals", "training_type", "training_method")
SLACK: Final = 300.0  # seconds by which the clock of the service may differ from ours


class TogetherService:
    """The provider. It opens no connection, and reads no key, before the first request."""

    def __init__(self, options: Together) -> None:
        self.options = options
        self._address = options.base_url.rstrip("/").removesuffix("/v1")
        self._client: ServiceClient | None = None
        self._key: Secret | None = None

    def scope(self) -> str:
        project = os.environ.get("TOGETHER_PROJECT_ID", "")
        return f"{self._address}#{project}" if project else self._address

    @property
    def client(self) -> ServiceClient:
        """The client, created at its first use."""
        if self._client is None:
            self._client = ServiceClient(self._address, service="together", headers=self._headers)
        return self._client

    def _headers(self) -> Mapping[str, str | Secret]:
        if self._key is None:
            self._key = read_secret(self.options.api_key, "together.api_key")
        return {"authorization": self._key.with_prefix("Bearer ")}

    async def check(self) -> Mapping[str, Any]:
        jobs = await self.client.read_json("/v1/fine-tunes")
        return {"jobs": len(jobs.get("data") or [])}

    async def capabilities(self, model: str) -> Capabilities:
        return describe_offer()

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        findings = []
        if self.options.n_evals and "validation" not in job.files:
            findings.append(Finding(level="error", rule="setting", where="provider.n_evals",
                                    message="evaluations need validation rows: set data.validation"))  # fmt: skip
        both = {"adapter.name", "adapter.r"} <= job.settings.keys() and job.settings["adapter.name"] == "full"
        if both:
            findings.append(
                Finding(level="error", rule="setting", where="adapter.r", message="full training has no rank")
            )
        return findings

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        return wire_row(row, weights=True)

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Any) -> str:
        """Send a file: ask for a signed link, send the bytes, and confirm them."""
        id = known if known is not None and await self._has_file(known) else await self._send_file(job, file, progress)
        if self.options.wait_for_files:
            await self._wait_checked(id, file)
        return id

    async def _has_file(self, id: str) -> bool:
        try:
            answer = await self.client.read_json(f"/v1/files/{id}")
        except ProviderError as error:
            if error.kind == "not_found":
                return False
            raise
        return answer.get("processing_status") not in ("FAILED", "INVALID_FORMAT")

    async def _send_file(self, job: JobSpec, file: DataFile, progress: Any) -> str:
        form = {"purpose": "fine-tune", "file_name": f"{job.id}-{file.path.name}", "file_type": "jsonl",
                "checksum": file.sha256}  # fmt: skip
        answer = await self.client.send_call(
            Call(method="POST", path="/v1/files", form=form, accepted=(200, 302, 409), repeatable=True)
        )
        if answer.status == 409:  # the service has these bytes already
            return str(answer.body["file_id"])
        link, id = answer.headers.get("location"), answer.headers.get("x-together-file-id")
        if not link or not id:
            raise ProviderError("protocol", "the answer has no upload link", where="together: POST /v1/files",
                                http_status=answer.status)  # fmt: skip
        await self.client.put_file(link, file.path, progress=progress)
        await self.client.post_json(f"/v1/files/{id}/preprocess", repeatable=True)
        return id

    async def _wait_checked(self, id: str, file: DataFile) -> None:
        """Wait until the service has read the file. Raise its message if it refuses it."""
        for _ in range(CHECKING):
            answer = await self.client.read_json(f"/v1/files/{id}")
            status, report = answer.get("processing_status"), answer.get("validation_report") or {}
            if status in ("FAILED", "INVALID_FORMAT") or report.get("valid") is False:
                raise ProviderError("invalid", f"the service refuses the file: {report.get('error') or status}",
                                    where=str(file.path))  # fmt: skip
            if status in CHECKED:
                return
            await self.client.clock.sleep(5.0)
        raise ProviderError("server", "the service has not checked the file in time", where=f"together: file {id}")

    async def estimate(self, job: JobSpec, uploads: Mapping[str, str]) -> CostEstimate | None:
        """Return the price that the service states. Raise if the account does not cover it."""
        body = self._body(job, uploads)
        asked = {name: body[name] for name in PRICED if name in body}
        answer = await self.client.post_json("/v1/fine-tunes/estimate-price", asked, repeatable=True)
        if not answer.get("estimation_available", True) or answer.get("estimated_total_price") is None:
            return None
        if answer.get("allowed_to_proceed") is False:
            problem = f"the account does not cover the price, {answer['estimated_total_price']:g} USD"
            raise ProviderError("quota", problem, where="together")
        tokens = answer.get("estimated_train_token_count")
        amount, whole = float(answer["estimated_total_price"]), None if tokens is None else int(tokens)
        return CostEstimate(amount=amount, tokens=whole, basis="stated by Together", exact_tokens=True)

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        return read_job(await self.client.post_json("/v1/fine-tunes", self._body(job, uploads)))

    def _body(self, job: JobSpec, uploads: Mapping[str, str]) -> dict[str, Any]:
        body = {**request_body(job.model, job.method, job.settings), "training_file": uploads["training"]}
        if "validation" in uploads:
            body["validation_file"] = uploads["validation"]
        for name in ("n_checkpoints", "n_evals"):
            if getattr(self.options, name) is not None:
                body[name] = getattr(self.options, name)
        return {**body, "suffix": self._suffix(job)}

    def _suffix(self, job: JobSpec) -> str:
        """Return the end of the model's name, which finds the job if the answer to its creation is lost."""
        return f"{self.options.suffix}-{job.token}" if self.options.suffix else job.token

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        """Search all jobs of the account, because the service has no filter."""
        jobs = (await self.client.read_json("/v1/fine-tunes")).get("data") or []
        mine = [item for item in jobs if self._is_mine(item, job, uploads)]
        return [read_job(item) for item in mine]

    def _is_mine(self, item: Mapping[str, Any], job: JobSpec, uploads: Mapping[str, str]) -> bool:
        named = job.token in f"{item.get('suffix') or ''} {item.get('model_output_name') or ''}"
        created = read_job(item).created
        return (
            named
            and item.get("training_file") in (None, uploads.get("training"))
            and (created is None or created >= job.created - SLACK)
        )

    async def status(self, remote_id: str) -> JobStatus:
        return read_job(await self.client.read_json(f"/v1/fine-tunes/{remote_id}"))

    async def cancel(self, remote_id: str) -> None:
        await self.client.post_json(f"/v1/fine-tunes/{remote_id}/cancel", repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        jobs = (await self.client.read_json("/v1/fine-tunes")).get("data") or []
        newest = sorted((read_job(item) for item in jobs), key=lambda job: job.created or 0.0, reverse=True)
        return newest[:limit]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return all events, and the metrics after the step of the cursor. The store drops known ones."""
        listed = (await self.client.read_json(f"/v1/fine-tunes/{remote_id}/events")).get("data") or []
        asked = {} if cursor is None else {"global_step_from": int(cursor)}
        answer = await self.client.read_json(f"/v1/fine-tunes/{remote_id}/metrics", asked)
        metrics = read_metrics(answer.get("metrics") or [])
        steps = [int(step) for event in metrics if (step := event.metrics.get("step")) is not None]
        events = sorted([*map(read_event, listed), *metrics], key=lambda event: event.at)
        return EventPage(events=events, cursor=str(max(steps)) if steps else cursor)

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        job = await self.client.read_json(f"/v1/fine-tunes/{remote_id}")
        is_lora = (job.get("training_type") or {}).get("type") == "Lora"
        kind, name = ("adapter", "adapter") if is_lora else ("model", "model_output_path")
        base, hosted = job.get("model"), job.get("model_output_name")
        ended = job.get("status") == "completed"
        artifacts = [
            JobArtifact(kind=kind, name=name, base_model=base, format="peft" if is_lora else "safetensors",
                        locator={"ft_id": remote_id, "checkpoint": name})
        ] if ended else []  # fmt: skip
        if hosted and ended:
            artifacts.append(JobArtifact(kind="hosted", name=hosted, base_model=base, downloadable=False))
        listed = (await self.client.read_json(f"/v1/fine-tunes/{remote_id}/checkpoints")).get("data") or []
        for item in listed:
            step = int(item["step"])
            place = {"ft_id": remote_id, "checkpoint": name, "checkpoint_step": step}
            label = f"checkpoint-{step}"
            artifacts.append(JobArtifact(kind="checkpoint", name=label, base_model=base, step=step, locator=place))
        return artifacts

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        archive = folder / ARCHIVE
        wanted = Wanted(address="/v1/finetune/download", params=artifact.locator)
        await download_file(self.client, wanted, archive, progress)
        files = unpack_archive(archive, folder)
        archive.unlink()
        return files

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()
