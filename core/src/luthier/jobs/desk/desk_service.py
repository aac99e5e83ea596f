"""The provider of runs on another machine: it sends the recipe, and asks the desk there for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from luthier.jobs.desk.desk_words import desk_words, read_desk
from luthier.jobs.desk.parcel import pack_job
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.transport.archive import unpack_archive
from luthier.plugins.providing.job_records import (
    Capabilities,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobStatus,
    Progress,
    from_plain_data,
)


class DeskPlace(Protocol):
    """A machine that runs can be started on. It reports what goes wrong as a `ProviderError`, by kind."""

    name: str  # for errors
    scope: str  # of jobs: identifies this machine
    processes: str | None  # torchrun's --nproc-per-node

    async def find_root(self) -> str:
        """Return the absolute folder that holds the folders of jobs."""

    async def ask_python(self, words: Sequence[str]) -> str:
        """Run the remote Python with these arguments, and return what it printed."""

    async def start_run(self, folder: str) -> None:
        """Make `desk_words("run", folder)` run on the machine, at once or when its turn comes."""

    async def find_waiting(self, folder: str) -> JobStatus | None:
        """Return a queue's status for a run without a visible worker; None if the queue has no such run."""

    async def end_run(self, folder: str) -> bool:
        """Ask for the end of a run by the place's own means. False means that the desk must ask for it."""

    async def send_files(self, files: Mapping[str, Path], folder: str) -> None:
        """Write files into a remote folder, under these names."""

    async def fetch_folder(self, folder: str, archive: Path, progress: Progress | None) -> None:
        """Write a remote folder to a tar file here."""


class DeskService:
    """The provider. A job is identified by its remote folder, whose name comes from the job's id."""

    def __init__(self, place: DeskPlace) -> None:
        self.place = place

    def scope(self) -> str:
        return self.place.scope

    async def check(self) -> Mapping[str, Any]:
        facts: Mapping[str, Any] = await self._ask("check", await self.place.find_root())
        return facts

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", weights=("adapter", "model"), poll=(2.0, 60.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        if not Path(job.model).exists():
            return ()
        message = f"{job.model} is a folder of this machine; the other machine must have the model at the same path"
        return [Finding(level="warning", rule="model", where="model", message=message)]

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Send the recipe and its rows, and start the run. A second start in one folder ends at once."""
        folder = await self._folder_of(job)
        await self.place.send_files(pack_job(job, folder, self.place.processes), folder)
        await self.place.start_run(folder)
        return await self.status(folder)

    async def _folder_of(self, job: JobSpec) -> str:
        return f"{await self.place.find_root()}/{job.id}"

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        try:
            return [await self.status(await self._folder_of(job))]
        except ProviderError as error:
            if error.kind == "not_found":
                return []
            raise

    async def status(self, remote_id: str) -> JobStatus:
        """Ask the desk for the status. If it sees no worker, or a dead one, the place may know better."""
        try:
            status = _status(await self._ask("status", remote_id), remote_id)
        except ProviderError as error:
            waiting = await self.place.find_waiting(remote_id) if error.kind == "not_found" else None
            if waiting is None:
                raise
            return waiting
        waiting = await self.place.find_waiting(remote_id) if status.raw_state == "lost" else None
        if waiting is None or waiting.state.is_final:
            return status
        return attrs.evolve(status, state=waiting.state, raw_state=waiting.raw_state, reason=None, finished=None)

    async def cancel(self, remote_id: str) -> None:
        if not await self.place.end_run(remote_id):
            await self._ask("cancel", remote_id)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        root = await self.place.find_root()
        return [_status(item, root) for item in await self._ask("list", root, str(limit))]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        plain_page = await self._ask("events", remote_id, cursor or "0")
        page: EventPage = from_plain_data(plain_page, EventPage, remote_id)
        return page

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        return [from_plain_data(item, JobArtifact, remote_id) for item in await self._ask("artifacts", remote_id)]

    async def download(self, artifact: JobArtifact, folder: Path, progress: Progress | None) -> Sequence[Path]:
        archive = folder / ".result.tar.partial"
        await self.place.fetch_folder(str(artifact.locator["path"]), archive, progress)
        files = unpack_archive(archive, folder)
        archive.unlink()
        return files

    async def close(self) -> None:
        """Do nothing, because nothing is kept open."""

    async def _ask(self, act: str, folder: str, *more: str) -> Any:
        where = f"{self.place.name}: {folder}"
        return read_desk(await self.place.ask_python(desk_words(act, folder, *more)), where)


def _status(plain_status: Any, where: str) -> JobStatus:
    status: JobStatus = from_plain_data(plain_status, JobStatus, where)
    return status
