"""Collection of results: a job's artifacts are downloaded and get a manifest of checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError, unwritable_path
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.transport.file_hash import hash_file
from luthier.logs import get_logger
from luthier.plugins.providing.job_records import (
    Job,
    JobArtifact,
    JobMetrics,
    Progress,
    TrainedArtifact,
    to_plain_data,
)
from luthier.plugins.providing.provider_protocol import Provider

log = get_logger()
MANIFEST: Final = "artifact.json"
WEIGHTS: Final = ("adapter", "model")
ROOM: Final = 1.1  # free disk space that is required, in multiples of the file's size


async def collect_artifact(
    job: Job, part: Provider, folder: Path | None, kind: str | None, metrics: JobMetrics, progress: Progress | None
) -> TrainedArtifact:
    """Download the best artifact of a job, or the best of a `kind`, and write its manifest beside it.

    Raises `provider-unsupported`, naming the model, if the service only hosts it.
    """
    assert job.remote_id is not None
    artifacts = await part.artifacts(job.remote_id)
    chosen = _choose_artifact(job, artifacts, kind)
    target = folder or Path(job.spec.output_dir or job.spec.folder) / chosen.kind
    _check_room(chosen, target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_path(target, error) from None
    files = await part.download(chosen, target, progress)
    made = TrainedArtifact(
        path=target,
        kind=chosen.kind,
        format=chosen.format,
        base_model=chosen.base_model or job.spec.model,
        job_id=job.id,
        remote_id=job.remote_id,
        metrics=metrics,
        adapter_config=_adapter_config(target),
        files={str(file.relative_to(target)): hash_file(file) for file in sorted(files) if file.name != MANIFEST},
    )
    (target / MANIFEST).write_text(json.dumps(to_plain_data(made), indent=2) + "\n", "utf-8")
    return made


def _choose_artifact(job: Job, artifacts: Sequence[JobArtifact], kind: str | None) -> JobArtifact:
    wanted = WEIGHTS if kind is None else (kind,)
    fitting = [a for a in artifacts if a.downloadable and a.kind in wanted]
    if fitting:
        return fitting[0]
    hosted = next((a.name for a in artifacts if a.kind == "hosted"), None)
    if hosted is not None:
        problem = f"{job.spec.provider} offers no download of the weights: the model stays at the service, as {hosted}"
        raise ProviderError("unsupported", problem, where=job.id, remedy=f"Ask the service for {hosted}.")
    what = f"{kind} to download" if kind else "result to download"
    raise LuthierError("artifact-not-found", f"there is no {what}; the job is {job.state}", where=job.id)


def _check_room(artifact: JobArtifact, target: Path) -> None:
    if artifact.size is None:
        return
    near = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(near).free
    if free < artifact.size * ROOM:
        raise LuthierError("disk-full", f"the download needs {artifact.size} bytes, {free} are free", where=str(target))


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    path = next(iter(sorted(folder.rglob("adapter_config.json"))), None)
    if path is None:
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        log.warning("the adapter's configuration cannot be read", path=str(path))
        return None
    return config if isinstance(config, dict) else None
