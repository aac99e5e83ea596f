"""The provider `local`: a run of this machine in a worker process of its own, which outlives whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from luthier.builtin import Local
from luthier.builtin.workers.local_worker import (
    CANCEL,
    ERRORS,
    EXIT,
    OUTPUT,
    WORKER,
    is_worker_alive,
    read_worker_note,
    write_note,
)
from luthier.errors import LuthierError
from luthier.jobs.desk.metric_lines import read_fresh_lines, read_line_event
from luthier.jobs.provider_error import ProviderError
from luthier.plugins.providing.job_records import (
    Capabilities,
    EventPage,
    Finding,
    JobArtifact,
    JobMetrics,
    JobProgress,
    JobSpec,
    JobStatus,
    Progress,
)
from luthier.plugins.providing.job_state import JobState
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.runs.run_folder import METRICS, RunFolder, is_held, read_folder
from luthier.runs.writing.target import find_place

STARTING: Final = 30.0  # seconds that a worker may take to write its first note
STOPPED: Final = (130, 143, -signal.SIGINT, -signal.SIGTERM)
KINDS: Final = {"adapter": "peft", "model": "safetensors", "merged": "safetensors"}
PAGE: Final = 2**18  # bytes of events in one reading
TAIL: Final = 4000  # characters of the end of an error


class WorkerProcesses:
    """Runs of this machine. A job's id here is its folder, so that nothing is kept in memory."""

    def __init__(self, options: Local) -> None:
        self.options = options

    def scope(self) -> str:
        return "this machine"

    async def check(self) -> dict[str, list[str]]:
        """Return the devices that a run could use here."""
        from luthier.hardware.devices import list_devices

        return {"devices": list_devices()}

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", weights=("adapter", "model"), poll=(0.2, 5.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        missing = [name for name in ("torch", "transformers", "safetensors", "numpy") if find_spec(name) is None]
        if missing:
            raise LuthierError("dependency-missing", f"{', '.join(missing)} not installed",
                               remedy='pip install "luthier[local]"')  # fmt: skip
        place = find_place(Recipe.load(job.folder / "recipe.yaml"), Objects(), fresh=False)
        if is_held(place.folder):
            problem, remedy = "a run is going on there", "`luthier jobs` lists it; give another output_dir, or wait."
            raise LuthierError("run-folder-locked", problem, where=str(place.folder), remedy=remedy)
        return ()

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Start the worker; a second one on the same folder ends at once, so that there is never more than one."""
        write_note(job.folder / "launch.json", {"arguments": self._arguments(job), "run": str(job.output_dir)})
        words = [sys.executable, "-m", "luthier.builtin.workers.local_worker", str(job.folder)]
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, env={k: v for k, v in os.environ.items() if k != "LUTHIER_JOBS"},
        )  # fmt: skip
        begun = time.monotonic()
        while read_worker_note(job.folder / WORKER) is None:
            if process.poll() is not None or time.monotonic() - begun > STARTING:
                raise ProviderError("lost", f"the worker has not started (exit {process.poll()})", where=job.id)
            await asyncio.sleep(0.02)
        return await self.status(str(job.folder))

    def _arguments(self, job: JobSpec) -> list[str]:
        processes = self.options.nproc_per_node
        return [
            *("-m", "luthier", "train", str(job.folder / "recipe.yaml"), "--json"),
            *([] if processes is None else ["--nproc-per-node", processes]),
        ]

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        begun = time.monotonic()
        while (
            is_worker_alive(job.folder) and read_worker_note(job.folder / WORKER) is None
        ):  # it is about to write its note
            if time.monotonic() - begun > STARTING:
                break
            await asyncio.sleep(0.02)
        return [await self.status(str(job.folder))] if read_worker_note(job.folder / WORKER) is not None else []

    async def status(self, remote_id: str) -> JobStatus:
        folder = Path(remote_id)
        worker = read_worker_note(folder / WORKER)
        if worker is None:
            raise ProviderError("not_found", "no worker was started in this folder", where=remote_id)
        ended, alive = read_worker_note(folder / EXIT), is_worker_alive(folder)
        ended = ended or read_worker_note(folder / EXIT)  # the worker may have ended between the two looks
        run = read_folder(Path(worker["run"]))
        state, raw, reason = _state_of(folder, ended, run, alive=alive)
        return JobStatus(
            remote_id=remote_id,
            state=state,
            raw_state=raw,
            phase=None if state.is_final else "training" if run.recent else "starting",
            reason=reason,
            progress=_progress_of(run, float(worker["started"])),
            metrics=_metrics_of(run, worker, ended),
            result_model=str(run.path) if state == JobState.COMPLETED else None,
            created=float(worker["started"]),
            finished=None if ended is None else float(ended["at"]),
        )

    async def cancel(self, remote_id: str) -> None:
        """Ask the worker to end after the step that it is in, with a checkpoint."""
        folder = Path(remote_id)
        worker = read_worker_note(folder / WORKER)
        if worker is None or not is_worker_alive(folder):
            return
        (folder / CANCEL).touch()
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(worker["pid"]), signal.SIGTERM)

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        worker = read_worker_note(Path(remote_id) / WORKER)
        if worker is None:
            return EventPage(events=[], cursor=cursor)
        fresh = read_fresh_lines(Path(worker["run"]) / METRICS, int(cursor or 0), PAGE)
        events = [event for line in fresh.lines if (event := read_line_event(line, fresh.at)) is not None]
        return EventPage(events=events, cursor=str(fresh.offset))

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        worker = read_worker_note(Path(remote_id) / WORKER)
        run = Path(worker["run"]) if worker else Path(remote_id)
        return [
            JobArtifact(kind="model" if name == "merged" else name, name=name, format=form,
                        locator={"path": str(run / name)})
            for name, form in KINDS.items()
            if (run / name).is_dir()
        ]  # fmt: skip

    async def download(self, artifact: JobArtifact, folder: Path, progress: Progress | None) -> Sequence[Path]:
        source = Path(artifact.locator["path"])
        if source.resolve() != folder.resolve():
            shutil.copytree(source, folder, dirs_exist_ok=True)
        return [path for path in folder.rglob("*") if path.is_file()]


def _state_of(
    folder: Path, ended: Mapping[str, Any] | None, run: RunFolder, *, alive: bool
) -> tuple[JobState, str, str | None]:
    """State, the worker's own word for it, and the reason."""
    if ended is None and alive:
        return (JobState.RUNNING if run.recent else JobState.PENDING), "alive", None
    if ended is None:
        asked = (folder / CANCEL).exists()
        return (JobState.CANCELED if asked else JobState.FAILED), "lost", "the worker was killed, or the machine ended"
    code = int(ended["code"])
    if code == 0:
        return JobState.COMPLETED, "exit 0", None
    if code in STOPPED:
        return JobState.CANCELED, f"exit {code}", "stopped by a signal; its last checkpoint is kept"
    return JobState.FAILED, f"exit {code}", read_reason(folder) or f"the worker ended with status {code}"


def read_reason(folder: Path) -> str | None:
    """Return the error that the run ended with: its JSON document, or the end of what it wrote to standard error."""
    try:
        document = json.loads((folder / OUTPUT).read_text("utf-8"))
        return str(document["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        return (folder / ERRORS).read_text("utf-8", "replace")[-TAIL:].strip() or None
    except OSError:
        return None


def _progress_of(run: RunFolder, started: float) -> JobProgress:
    tokens = run.latest("total_tokens")
    return JobProgress(
        step=run.step or None,
        total_steps=run.total_steps,
        epoch=run.latest("epoch"),
        loss=run.latest("loss"),
        learning_rate=run.latest("learning_rate"),
        tokens=None if tokens is None else int(tokens),
        seconds_left=_seconds_left(run, started),
    )


def _metrics_of(run: RunFolder, worker: Mapping[str, Any], ended: Mapping[str, Any] | None) -> JobMetrics:
    until = time.time() if ended is None else float(ended["at"])
    tokens = run.latest("total_tokens")
    return JobMetrics(
        train_loss=run.latest("loss"),
        eval_loss=run.latest("eval_loss"),
        duration=max(until - float(worker["started"]), 0.0),
        tokens=None if tokens is None else int(tokens),
        cost=0.0,
    )


def _seconds_left(run: RunFolder, started: float) -> float | None:
    """Time left, at the job's own pace so far."""
    total = run.total_steps
    if total is None or run.step == 0 or run.state != "running":
        return None
    return max(total - run.step, 0) * max(time.time() - started, 0.0) / run.step
