"""Jobs of a Ray cluster: each is one submission, named by the job's id. Ray itself is not imported."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import secrets
import shlex
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import attrs
from luthier import (
    Call,
    Capabilities,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobState,
    JobStatus,
    Parcel,
    ProviderError,
    Secret,
    ServiceClient,
    ToldRun,
    drop_missing,
    get_logger,
    pack_parcel,
    read_secret,
    read_told,
    sent_words,
    unpack_archive,
)

from luthier_ray import Ray
from luthier_ray.worker_plan import DRIVER, describe_workers

log = get_logger()
JOBS: Final = "/api/jobs/"
TAG: Final = "luthier_job"  # the metadata that marks our jobs
PARCEL: Final = "parcel.tar.gz"
LARGEST: Final = 500_000_000  # bytes: the cluster's own store takes 512 MB
STATES: Final = {
    "PENDING": JobState.PENDING, "RUNNING": JobState.RUNNING, "SUCCEEDED": JobState.COMPLETED,
    "FAILED": JobState.FAILED, "STOPPED": JobState.CANCELED,
}  # fmt: skip
GRACE: Final = "600"  # seconds that a stopped job has for its last checkpoint; Ray's default is 3
LOOK: Final = 1.0  # seconds between two status requests for a job that writes its result


def build_service(options: Ray) -> RayService:
    """Return the provider. It opens no connection before the first request."""
    return RayService(options)


class RayService:
    """The jobs of one cluster. The remote id of a job is the id of its submission."""

    def __init__(self, options: Ray) -> None:
        self.options = options
        self._client: ServiceClient | None = None
        self._packed: tuple[str, Parcel] | None = None

    @property
    def client(self) -> ServiceClient:
        """The client, created at its first use."""
        if self._client is None:
            self._client = ServiceClient(self.options.address, service="ray", headers=_headers_of(self.options))
        return self._client

    def scope(self) -> str:
        return self.options.address.rstrip("/")

    async def check(self) -> Mapping[str, Any]:
        answer = await self.client.read_json("/api/version")
        return {"ray": answer.get("ray_version"), "api": answer.get("version")}

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", weights=("adapter", "model"), poll=(2.0, 60.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Pack the parcel, so that problems are reported before anything is sent."""
        size = len(self._parcel(job).content)
        if size <= LARGEST:
            return ()
        message = f"the packed recipe and rows have {size} bytes, but at most {LARGEST} can be sent"
        return [Finding(level="error", rule="size", where="data.train", message=message)]

    def _parcel(self, job: JobSpec) -> Parcel:
        if self._packed is None or self._packed[0] != job.id:
            self._packed = job.id, self._pack(job)
        return self._packed[1]

    def _pack(self, job: JobSpec) -> Parcel:
        """Return the parcel. With several workers its launch is the driver of Ray Train, which is installed there."""
        options, name = self.options, _name_job(job.id)
        if options.workers == 1:
            return pack_parcel(job, self._folder(name), options.nproc_per_node)
        parcel = pack_parcel(job, self._folder(name), command=["-m", DRIVER, describe_workers(name, options)])
        return attrs.evolve(parcel, packages=[*parcel.packages, f"luthier-ray[train]=={version('luthier-ray')}"])

    def _folder(self, name: str) -> str:
        return f"{self.options.folder.rstrip('/')}/{name}"

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Send the parcel to the cluster's store, under the hash of its bytes, and submit the job."""
        parcel, name = self._parcel(job), _name_job(job.id)
        package = f"_ray_pkg_{hashlib.sha256(parcel.content).hexdigest()[:32]}.zip"
        await self.client.send_call(
            Call(method="PUT", path=f"/api/packages/gcs/{package}", content=_zip_parcel(parcel.content))
        )
        surroundings = {"working_dir": f"gcs://{package}", "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": GRACE}}
        words = ["python", "-u", *sent_words("run", self._folder(name)), PARCEL]
        request = self._request(name, words, parcel.packages, surroundings)
        alone = self.options.workers == 1  # the driver of several asks for nothing
        given = drop_missing(
            entrypoint_num_gpus=self.options.gpus if alone else None,
            entrypoint_num_cpus=self.options.cpus if alone else None,
        )
        await self.client.post_json(JOBS, {**request, "metadata": {TAG: job.id}, **given})
        return await self.status(name)

    def _request(
        self, name: str, words: Sequence[str], packages: Sequence[str], surroundings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a submission that asks for no GPU and no core."""
        installed = {"pip": list(packages)} if self.options.install else {}
        return {
            "submission_id": name,
            "entrypoint": shlex.join(words),
            "runtime_env": {**surroundings, **installed},
        }

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        try:
            return [await self.status(_name_job(job.id))]
        except ProviderError as error:
            if error.kind == "not_found":
                return []
            raise

    async def status(self, remote_id: str) -> JobStatus:
        """Return the status of the submission. The reason of a failure is read from its output, if it exists."""
        status = self._status(await self.client.read_json(f"{JOBS}{remote_id}"))
        if status.state != JobState.FAILED:
            return status
        try:
            output = await self._read_output(remote_id)
        except ProviderError as error:
            reason = status.reason or "Ray gives no reason"
            return attrs.evolve(status, reason=f"{reason}; its output cannot be read: {error.problem}")
        return status if output.reason is None else attrs.evolve(status, reason=output.reason)

    def _status(self, item: Any) -> JobStatus:
        if not isinstance(item, dict) or "status" not in item or not item.get("submission_id"):
            raise ProviderError("protocol", "the answer is not a job of Ray", where="ray")
        name, raw = str(item["submission_id"]), str(item["status"])
        state = STATES.get(raw, JobState.UNKNOWN)
        begun, ended = item.get("start_time"), item.get("end_time")
        return JobStatus(
            remote_id=name,
            state=state,
            raw_state=raw,
            phase=item.get("message") if state == JobState.PENDING else None,
            reason=item.get("message") if state == JobState.FAILED else None,
            result_model=self._folder(name) if state == JobState.COMPLETED else None,
            created=begun / 1000 if begun else None,
            finished=ended / 1000 if ended else None,
        )

    async def cancel(self, remote_id: str) -> None:
        """Stop the submission. Its processes get the signal that ends a run within a step."""
        if not (await self.status(remote_id)).state.is_final:
            await self.client.post_json(f"{JOBS}{remote_id}/stop", repeatable=True)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        items = await self.client.read_json(JOBS)
        ours = [item for item in items if (item.get("metadata") or {}).get(TAG) and item.get("submission_id")]
        newest = sorted(ours, key=lambda item: item.get("start_time") or 0, reverse=True)
        return [self._status(item) for item in newest[:limit]]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        output = await self._read_output(remote_id)
        return EventPage(events=output.events[int(cursor or 0) :], cursor=str(len(output.events)))

    async def _read_output(self, name: str) -> ToldRun:
        document = await self.client.read_json(f"{JOBS}{name}/logs")
        return read_told(str(document.get("logs") or "").splitlines())

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        results = (await self._read_output(remote_id)).results
        return [
            JobArtifact(kind="model" if name == "merged" else name, name=name, locator={"path": path})
            for name, path in results.items()
        ]

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        """Download a folder: a small job of the cluster writes it to its output, and is deleted afterwards."""
        name = f"luthier-give-{secrets.token_hex(8)}"
        words = ["python", "-u", *sent_words("give", str(artifact.locator["path"]))]
        packages = [f"luthier[local]=={version('luthier')}"]
        try:
            await self.client.post_json(JOBS, self._request(name, words, packages, {}))
        except ProviderError as error:
            if not error.may_have_created:
                raise
        status: JobStatus | None = None
        try:
            status = await self._wait_final(name)
            output = await self._read_output(name)
        finally:
            await self._take_away(name, ended=status is not None)
        if output.archive is None:
            raise ProviderError("invalid", status.reason or "the cluster gave no result", where=f"ray: {name}")
        return _unpack_text(output.archive, folder)

    async def _wait_final(self, name: str) -> JobStatus:
        while not (status := self._status(await self.client.read_json(f"{JOBS}{name}"))).state.is_final:
            await self.client.clock.sleep(LOOK)
        return status

    async def _take_away(self, name: str, *, ended: bool) -> None:
        """Delete a submission when it has ended. If that fails, warn."""
        try:
            if not ended:
                await self.client.send_call(Call(method="POST", path=f"{JOBS}{name}/stop", accepted=(200, 404)))
            await self.client.send_call(Call(method="DELETE", path=f"{JOBS}{name}", accepted=(200, 404)))
        except ProviderError as error:
            log.warning("a small job that wrote a result remains on the cluster", job=name, reason=error.problem)

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def _name_job(id: str) -> str:
    return f"luthier-{id}"


def _zip_parcel(content: bytes) -> bytes:
    """Return a zip of a working folder whose only file is the parcel."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo(PARCEL), content)
    return packed.getvalue()


def _unpack_text(text: str, folder: Path) -> list[Path]:
    archive = folder / ".result.tar.partial"
    try:
        archive.write_bytes(base64.b64decode(text, validate=True))
        return unpack_archive(archive, folder)
    except binascii.Error:
        raise ProviderError("protocol", "the result is damaged", where="ray") from None
    finally:
        archive.unlink(missing_ok=True)


def _headers_of(options: Ray) -> Any:
    reference = options.token

    @cache
    def bearer() -> dict[str, Secret]:
        return (
            {} if reference is None else {"authorization": read_secret(reference, "ray.token").with_prefix("Bearer ")}
        )

    return bearer
