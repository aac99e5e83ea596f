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
    """The part that runs a job elsewhere: another process, a hosted service, a cluster.

    It keeps no job in memory: everything that it needs is in the `JobSpec` and in the id that it gave the job itself,
    `remote_id`. Every method may be cancelled at any await. What goes wrong is a `ProviderError`, by kind.
    """

    @abstractmethod
    async def check(self) -> Mapping[str, Any]:
        """Ask, without cost, whether the service can be reached and knows the key; return what it says of it."""
        ...

    @abstractmethod
    async def capabilities(self, model: str) -> Capabilities:
        """Return what can be done with a model. No request is made; an unlisted model is tried."""
        ...

    @abstractmethod
    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Create the job once, and never send the request twice: whether a lost one arrived is asked by `find`.

        `uploads` has the service's id of each file of the job, by its role.
        """
        ...

    @abstractmethod
    async def status(self, remote_id: str) -> JobStatus:
        """Return where the job stands, by reading alone. A state that is not known is `JobState.UNKNOWN`."""
        ...

    @abstractmethod
    async def cancel(self, remote_id: str) -> None:
        """Ask for the end of the job. Asking again, or for a job that has ended, is no error."""
        ...

    def scope(self) -> str:
        """Return the address or account that jobs belong to, so that another one's are told apart."""
        return ""

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Return what is wrong with a job beyond what `capabilities` says, without a request."""
        return ()

    def encode(self, row: ServiceRow) -> Mapping[str, Any]:
        """Return a row as a line of the service's own file, for a provider that takes rows."""
        raise LuthierError("part-unsupported", "this provider takes no rows", where="provider")

    async def estimate(self, job: JobSpec, uploads: Mapping[str, str]) -> CostEstimate | None:
        """Return the cost by the service's own word, asked once the files are there; None: it gives none."""
        return None

    async def upload(self, job: JobSpec, file: DataFile, known: str | None, progress: Progress | None) -> str:
        """Send a file and return the service's id of it. `known` is the id of the same bytes, sent before."""
        raise LuthierError("part-unsupported", "this provider takes no files", where="provider")

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus] | None:
        """Return the jobs that a `submit` of this job may have made; None where the service cannot tell."""
        return None

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Return the newest jobs of the account, at most `limit`."""
        raise LuthierError("part-unsupported", "this provider lists no jobs", where="provider")

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return the events after a cursor, None: from the first; the same event has the same id at every reading."""
        return EventPage(events=[], cursor=cursor)

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        """Return the results of a job, the best first."""
        return ()

    async def download(self, artifact: JobArtifact, folder: Path, progress: Progress | None) -> Sequence[Path]:
        """Put an artifact's files into a folder and return them."""
        raise LuthierError("part-unsupported", "this provider gives no files", where="provider")

    async def close(self) -> None:
        """Close connections."""
