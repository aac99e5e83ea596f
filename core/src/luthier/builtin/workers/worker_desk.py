"""The desk of a machine that trains for another: `python -m luthier.builtin.workers.worker_desk ACT FOLDER`.

It answers in JSON, is asked through ssh, a batch system or the like, and keeps nothing but the folders of jobs.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from luthier.builtin import Local
from luthier.builtin.local import STARTING, WorkerProcesses
from luthier.builtin.workers.local_worker import CANCEL, LAUNCH, WORKER, read_worker_note, run_worker
from luthier.errors import LuthierError
from luthier.jobs.desk.desk_words import DESK, MARK
from luthier.jobs.provider_error import ProviderError
from luthier.plugins.providing.job_records import to_plain_data

DESK_OF: Final = WorkerProcesses(Local())


def check_machine(root: Path) -> dict[str, Any]:
    """Return the version of Luthier here, and the devices that a run could use."""
    return {"version": version("luthier"), **asyncio.run(DESK_OF.check())}


def start_worker(folder: Path) -> bool:
    """Start a worker that needs nobody to live; where one runs or has run, this does nothing."""
    words = [sys.executable, "-m", DESK, "run", str(folder)]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    begun = time.monotonic()
    while not (folder / WORKER).exists():
        if process.poll() is not None or time.monotonic() - begun > STARTING:
            raise ProviderError("lost", f"the worker has not started (exit {process.poll()})", where=str(folder))
        time.sleep(0.05)
    return True


def show_status(folder: Path) -> Any:
    return to_plain_data(asyncio.run(DESK_OF.status(str(folder))))


def show_events(folder: Path, cursor: str) -> Any:
    return to_plain_data(asyncio.run(DESK_OF.events(str(folder), cursor)))


def cancel_run(folder: Path) -> bool:
    """Ask a run to end after its step; one that has not begun will end at once when its turn comes."""
    if (folder / LAUNCH).exists() and not (folder / WORKER).exists():
        (folder / CANCEL).touch()
    asyncio.run(DESK_OF.cancel(str(folder)))
    return True


def show_artifacts(folder: Path) -> Any:
    return [to_plain_data(item) for item in asyncio.run(DESK_OF.artifacts(str(folder)))]


def list_runs(root: Path, limit: str) -> Any:
    """Return the statuses of the newest runs; folders are named by the time of their jobs."""
    folders = sorted((path for path in root.glob("*") if read_worker_note(path / WORKER)), reverse=True)
    return [show_status(folder) for folder in folders[: int(limit)]]


ACTS: Final[Mapping[str, Callable[..., Any]]] = {
    "check": check_machine, "start": start_worker, "status": show_status, "events": show_events,
    "cancel": cancel_run, "artifacts": show_artifacts, "list": list_runs,
}  # fmt: skip


def answer(words: list[str]) -> int:
    """Carry out an act and write its answer; `run` trains in this process and answers by its exit status."""
    act, folder, *more = words
    if act == "run":
        return run_worker(Path(folder))
    try:
        reply = {"value": ACTS[act](Path(folder), *more)}
    except ProviderError as error:
        reply = {"error": {"kind": error.kind, "message": error.problem}}
    except LuthierError as error:
        reply = {"error": {"kind": "invalid", "message": str(error)}}
    print(MARK + json.dumps(reply))
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(answer(sys.argv[1:]))
