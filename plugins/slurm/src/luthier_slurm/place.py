"""A Slurm cluster, seen from a machine that has its commands: a shared folder and a queue."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from luthier import DeskService, JobState, JobStatus, ProviderError, desk_words

from luthier_slurm import Slurm
from luthier_slurm.commands import STATES, find_queued, run_command

SUBMITTED: Final = "slurm.job"  # file in a job's folder with the number that sbatch gave
CANCELED: Final = "cancel"  # file that tells the worker that its run is cancelled
OPTIONS: Final = {
    "partition": "partition", "account": "account", "gpus": "gpus", "cpus_per_task": "cpus-per-task", "memory": "mem",
    "time_limit": "time",
}  # fmt: skip


def build_service(options: Slurm) -> DeskService:
    """Return the provider. It runs no command before the first request."""
    return DeskService(SlurmPlace(options))


class SlurmPlace:
    """One cluster."""

    name = "slurm"

    def __init__(self, options: Slurm) -> None:
        self.options, self.processes = options, options.nproc_per_node
        self.root = Path(options.folder).expanduser().absolute()
        self.scope = f"slurm:{self.root}"
        self.python = options.python or sys.executable

    async def find_root(self) -> str:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return str(self.root)

    async def ask_python(self, words: Sequence[str]) -> str:
        return await run_command([self.python, *words])

    async def start_run(self, folder: str) -> None:
        """Submit the script that trains, and write its number into the folder."""
        given = [f"--{wire}={getattr(self.options, name)}" for name, wire in OPTIONS.items()
                 if getattr(self.options, name) is not None]  # fmt: skip
        words = ["sbatch", "--parsable", "--nodes=1", "--ntasks=1", f"--job-name={_job_name(folder)}",
                 f"--chdir={folder}", f"--output={folder}/slurm.log", *given]  # fmt: skip
        script = f"#!/bin/sh\nexec {shlex.join([self.python, *desk_words('run', folder)])}\n"
        number = (await run_command(words, script)).strip().partition(";")[0]
        if not number.isdigit():
            raise ProviderError("protocol", f"sbatch gave no number: {number[:80]}", where="slurm: sbatch")
        await asyncio.to_thread((Path(folder) / SUBMITTED).write_text, number)

    async def find_waiting(self, folder: str) -> JobStatus | None:
        """Return the status from the queue. A job that is not in it, and whose worker never began, has failed."""
        queued = await find_queued(_job_name(folder))
        if queued is not None:
            number, word, reason = queued
            state = STATES.get(word, JobState.UNKNOWN)
            cause = reason if reason not in ("", "None") else f"Slurm's job {number} ended as {word}"
            return JobStatus(remote_id=folder, state=state, raw_state=word, phase=None if state.is_final else "queued",
                             reason=cause if state == JobState.FAILED else None)  # fmt: skip
        if (Path(folder) / CANCELED).exists():
            return JobStatus(remote_id=folder, state=JobState.CANCELED, raw_state="gone")
        if not (Path(folder) / SUBMITTED).exists():
            return None
        reason = "Slurm does not know the job any more, and its worker never began: see slurm.log in its folder"
        return JobStatus(remote_id=folder, state=JobState.FAILED, raw_state="gone", reason=reason)

    async def end_run(self, folder: str) -> bool:
        """Remove a waiting job from the queue, or send a running one the signal that ends it within a step."""
        queued = await find_queued(_job_name(folder))
        state = JobState.UNKNOWN if queued is None else STATES.get(queued[1], JobState.UNKNOWN)
        if queued is not None and not state.is_final:
            (Path(folder) / CANCELED).touch()
            signal = ["--signal=TERM", "--batch"] if state == JobState.RUNNING else []
            await run_command(["scancel", *signal, queued[0]])
        return True

    async def send_files(self, files: Mapping[str, Path], folder: str) -> None:
        await asyncio.to_thread(_copy_files, files, Path(folder))

    async def fetch_folder(self, folder: str, archive: Path, progress: Any) -> None:
        await asyncio.to_thread(_pack_folder, Path(folder), archive)


def _job_name(folder: str) -> str:
    return f"luthier-{folder.rpartition('/')[2]}"


def _copy_files(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copyfile(path, target)


def _pack_folder(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, arcname=".")
