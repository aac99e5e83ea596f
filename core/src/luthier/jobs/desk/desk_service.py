"""The provider of runs on another machine: it brings the recipe there, and asks the desk there for everything else."""

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
    """A machine that runs can be started on. What goes wrong is a `ProviderError`, by kind."""

    name: str  # named in errors
    scope: str  # of jobs: this machine and no other
    processes: str | None  # torchrun's --nproc-per-node

    async def find_root(self) -> str:
        """Return the absolute folder that the folders of jobs lie in."""

    async def ask_python(self, words: Sequence[str]) -> str:
        """Run the Python over there with these arguments, and return what it wrote."""

    async def start_run(self, folder: str) -> None:
        """See to it that `desk_words("run", folder)` runs over there, now or when its turn comes."""

    async def find_waiting(self, folder: str) -> JobStatus | None:
        """Return the status of a run whose worker is not seen, as a queue has it; None where there is no such run."""

    async def end_run(self, folder: str) -> bool:
        """Ask for the end of a run by the place's own means; False: the desk over there is to ask for it."""

    async def send_files(self, files: Mapping[str, Path], folder: str) -> None:
        """Put files below a folder over there, under these names."""

    async def fetch_folder(self, folder: str, archive: Path, progress: Progress | None) -> None:
        """Write a folder over there to a tar here."""


class DeskService:
    """The provider. A job is known by its folder over there, whose name comes from the job's id."""

    def __init__(self, place: DeskPlace) -> None:
        self.place = place

    def scope(self) -> str:
        return self.place.scope

    async def check(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("check", await self.place.find_root())
        return found

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", weights=("adapter", "model"), poll=(2.0, 60.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        if not Path(job.model).exists():
            return ()
        message = f"{job.model} is a folder of this machine; over there the same path must hold the model"
        return [Finding(level="warning", rule="model", where="model", message=message)]

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Bring the recipe and its rows there, and start; a second start in one folder ends at once."""
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
        """Ask the desk; where it sees no worker, or sees that it is gone, the place may know better."""
        try:
            found = _status(await self._ask("status", remote_id), remote_id)
        except ProviderError as error:
            waiting = await self.place.find_waiting(remote_id) if error.kind == "not_found" else None
            if waiting is None:
                raise
            return waiting
        waiting = await self.place.find_waiting(remote_id) if found.raw_state == "lost" else None
        if waiting is None or waiting.state.is_final:
            return found
        return attrs.evolve(found, state=waiting.state, raw_state=waiting.raw_state, reason=None, finished=None)

    async def cancel(self, remote_id: str) -> None:
        if not await self.place.end_run(remote_id):
            await self._ask("cancel", remote_id)

    async def list(self, limit: int) -> Sequence[JobStatus]:
        root = await self.place.find_root()
        return [_status(item, root) for item in await self._ask("list", root, str(limit))]

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        found = await self._ask("events", remote_id, cursor or "0")
        page: EventPage = from_plain_data(found, EventPage, remote_id)
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
        """Nothing is kept open."""

    async def _ask(self, act: str, folder: str, *more: str) -> Any:
        where = f"{self.place.name}: {folder}"
        return read_desk(await self.place.ask_python(desk_words(act, folder, *more)), where)


def _status(found: Any, where: str) -> JobStatus:
    status: JobStatus = from_plain_data(found, JobStatus, where)
    return status
