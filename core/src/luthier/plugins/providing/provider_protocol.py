"""The contract of a provider: the place where a job trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from luthier.errors import LuthierError
from luthier.plugins.providing.job_records import (
    Capabilities,
    CostEstimate,
    DataFile,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobStatus,
    Progress,
    ServiceRow,
)


@runtime_checkable
class Provider(Protocol):
    """The part that trains a job elsewhere: in another process, at a hosted service, on a cluster.

    It keeps no job in memory: everything that it needs is in the `JobSpec` and in `remote_id`, the id that the service
    gave the job. Every method may be cancelled at any await. It reports what goes wrong as a `ProviderError`, by kind.
    """

    @abstractmethod
    async def check(self) -> Mapping[str, Any]:
        """Check without cost that the service can be reached and accepts the key; return what it says."""
        ...

    @abstractmethod
    async def capabilities(self, model: str) -> Capabilities:
        """Return what the provider can do with a model.

        It makes no request; a model that is not listed may be tried.
        """
        ...

    @abstractmethod
    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Create the job once. Never send the request twice: `find` tells later whether a lost request arrived.

        `uploads` maps the role of each file of the job to the service's id of it.
        """
        ...

    @abstractmethod
    async def status(self, remote_id: str) -> JobStatus:
        """Return the state of the job without changing anything. A state that is not known is `JobState.UNKNOWN`."""
        ...

    @abstractmethod
    async def cancel(self, remote_id: str) -> None:
        """Ask the service to end the job. It is no error to ask again, or for a job that has ended."""
        ...

    def scope(self) -> str:
        """Return the address or account that jobs belong to, so that jobs of another account are told apart."""
        return ""

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Return what is wrong with a job beyond what `capabilities` says. It makes no request."""
        return ()

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        """Return a row as one line of the service's own file format. Only a provider that takes rows needs it."""
        raise LuthierError("part-unsupported", "this provider takes no rows", where="provider")

    async def estimate(self, job: JobSpec, uploads: Mapping[str, str]) -> CostEstimate | None:
        """Return the cost that the service itself states, asked once the files are uploaded; None if it states none."""
        return None

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Progress | None) -> str:
        """Send a file and return the service's id of it.

        `known` is the id under which the same bytes were sent before, or None.
        """
        raise LuthierError("part-unsupported", "this provider takes no files", where="provider")

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus] | None:
        """Return the jobs that a `submit` of this job may have created; None if the service cannot tell."""
        return None

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Return the newest jobs of the account, at most `limit`."""
        raise LuthierError("part-unsupported", "this provider lists no jobs", where="provider")

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return the events after a cursor (None: from the first). The same event has the same id in every reading."""
        return EventPage(events=[], cursor=cursor)

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        """Return the results of a job, the best first."""
        return ()

    async def download(self, artifact: JobArtifact, folder: Path, progress: Progress | None) -> Sequence[Path]:
        """Write an artifact's files into a folder and return their paths."""
        raise LuthierError("part-unsupported", "this provider gives no files", where="provider")

    async def close(self) -> None:
        """Close connections."""
