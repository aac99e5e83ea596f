"""The worker of a local job: a small process that owns the job's folder, runs the training, and notes how it ended.

It is started in a session of its own and needs nobody to live. `worker.json` says that the job exists, the lock that it
lives, and `exit.json` how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Final

from filelock import lock_descriptor

from luthier.runs.writing.lock import is_lock_held, sign_lock

WORKER: Final = "worker.json"
EXIT: Final = "exit.json"
LAUNCH: Final = "launch.json"
CANCEL: Final = "cancel"
LOCK: Final = "worker.lock"
OUTPUT: Final = "output.json"
ERRORS: Final = "errors.log"


def read_worker_note(path: Path) -> dict[str, Any] | None:
    """Return a note's values; None where it is not there, or not whole."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_note(path: Path, values: dict[str, Any]) -> None:
    """Write a note so that nobody reads half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_worker_alive(folder: Path) -> bool:
    """Return True where a worker holds the folder's lock; it cannot be mistaken for a later process of its number."""
    return is_lock_held(folder / LOCK)


def run_worker(folder: Path) -> int:
    """Train in this folder, unless another worker does or has; return the exit status."""
    with (folder / LOCK).open("a") as lock:
        for _ in range(50):  # a process that only looks holds the lock for microseconds
            if lock_descriptor(lock.fileno(), blocking=False):
                break
            if (folder / WORKER).exists():
                return 0
            time.sleep(0.01)
        else:
            return 0
        if (folder / WORKER).exists():
            return 0
        sign_lock(lock, folder)
        launch = read_worker_note(folder / LAUNCH) or {}
        process: list[subprocess.Popen[bytes]] = []
        _forward_signals(folder, process)
        note = {"pid": os.getpid(), "started": time.time(), "run": launch["run"]}
        write_note(folder / WORKER, note)
        code = _train(folder, launch["arguments"], process)
        write_note(folder / EXIT, {"code": code, "at": time.time()})
    return code


def _train(folder: Path, arguments: list[str], process: list[subprocess.Popen[bytes]]) -> int:
    if (folder / CANCEL).exists():
        return 143
    with (folder / OUTPUT).open("wb") as output, (folder / ERRORS).open("ab") as errors:
        words = [sys.executable, *arguments]
        process.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, close_fds=True))
        if (folder / CANCEL).exists():
            process[0].terminate()
        return process[0].wait()


def _forward_signals(folder: Path, process: list[subprocess.Popen[bytes]]) -> None:
    """Hand on what asks for an end, or for a checkpoint, to the training process."""

    def forward(number: int, frame: FrameType | None) -> None:
        if process:
            process[0].send_signal(number)
        elif number != signal.SIGUSR1:
            (folder / CANCEL).touch()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(run_worker(Path(sys.argv[1])))
