"""The protocol of a provider, which trains a job in another place."""

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
    """The part that trains a job in another place: another process, a cluster, a hosted service.

    It keeps no job in memory. Everything that it needs is in the `JobSpec` and in `remote_id`, the service's own id of
    the job. Every method may be cancelled at any await. Failures are raised as `luthier.ProviderError`, whose `kind`
    says whether the call may be repeated.
    """

    @abstractmethod
    async def check(self) -> Mapping[str, Any]:
        """Check that the service can be reached and accepts the key, without cost, and return its answer."""
        ...

    @abstractmethod
    async def capabilities(self, model: str) -> Capabilities:
        """Return what the service can do with a model, without a request. An unlisted model is tried anyway."""
        ...

    @abstractmethod
    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Create the job and return its status. The request is sent once, and never repeated by the provider.

        If no answer arrives, the core calls `find` to learn whether the job exists. `uploads` maps the role of each
        file ("training", "validation") to the service's id of it.
        """
        ...

    @abstractmethod
    async def status(self, remote_id: str) -> JobStatus:
        """Return the status of a job without changing anything. A state that is not known is `JobState.UNKNOWN`."""
        ...

    @abstractmethod
    async def cancel(self, remote_id: str) -> None:
        """Ask the service to end the job. It is no error to ask twice, or for a job that has ended."""
        ...

    def scope(self) -> str:
        """Return the address or account that the jobs belong to, so that two accounts are not mixed up."""
        return ""

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Return what is wrong with a job beyond the rules in `capabilities`, without a request."""
        return ()

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        """Return a row as an object of the service's own file format. Only providers that take rows have it."""
        raise LuthierError("part-unsupported", "this provider takes no rows", where="provider")

    async def estimate(self, job: JobSpec, uploads: Mapping[str, str]) -> CostEstimate | None:
        """Return the cost that the service states, or None if it states none.

        It is asked after the upload of rows, or, by a provider that takes recipes, before anything is sent.
        """
        return None

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Progress | None) -> str:
        """Send a file and return the service's id of it. `known` is the id of an earlier upload of the same bytes."""
        raise LuthierError("part-unsupported", "this provider takes no files", where="provider")

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus] | None:
        """Return the jobs that a `submit` of this job may have created, or None if the service cannot tell."""
        return None

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Return at most `limit` jobs of the account, the newest first."""
        raise LuthierError("part-unsupported", "this provider lists no jobs", where="provider")

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return the events after `cursor`, or all if it is None. An event has the same id in every reading."""
        return EventPage(events=[], cursor=cursor)

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        """Return the results of a job, the best one first."""
        return ()

    async def download(self, artifact: JobArtifact, folder: Path, progress: Progress | None) -> Sequence[Path]:
        """Write the files of an artifact into `folder`, and return their paths."""
        raise LuthierError("part-unsupported", "this provider gives no files", where="provider")

    async def close(self) -> None:
        """Close all connections."""
