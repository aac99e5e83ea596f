"""Outcomes: files in which the processes of a launch report to the process that started them. Without torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError

FOLDER: Final = "_LUTHIER_LAUNCH"  # the variable that holds the folder's path
KINDS: Final = ("answer", "error", "stopped")


class Stopped(Exception):
    """The end of a launch in which all processes saved and stopped; `exit_status` is 128 plus the signal's number."""

    def __init__(self, message: str, exit_status: int) -> None:
        self.exit_status = exit_status
        super().__init__(message)


def outcome_folder() -> Path | None:
    """Return the folder for this process's outcome; None if luthier has not launched the process."""
    return Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None


def announce_rank(folder: Path, rank: int) -> None:
    """Record this process as one that signals go to, and delete the outcome of an earlier start."""
    for kind in KINDS:
        (folder / f"{kind}-{rank}.json").unlink(missing_ok=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))


def leave_outcome(folder: Path, rank: int, kind: str, document: Mapping[str, Any]) -> None:
    """Write an `answer`, an `error`, or that the run was `stopped`."""
    (folder / f"{kind}-{rank}.json").write_text(json.dumps(dict(document)), "utf-8")


def forward_signal(folder: Path, number: int) -> None:
    """Send a signal to every process that has started."""
    for path in folder.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), number)


def read_outcome(folder: Path) -> Mapping[str, Any]:
    """Return rank 0's answer, if no process failed; an empty one if rank 0 is on another machine.

    Raises `Stopped` if all processes stopped.
    """
    if _read(folder, "stopped"):
        raise read_stop(folder)
    return _read(folder, "answer").get(0, {})


def read_stop(folder: Path, number: int = signal.SIGTERM) -> Stopped:
    """Return how processes that a signal stopped have reported it.

    Before their first step they have reported nothing.
    """
    for stop in _read(folder, "stopped").values():
        return Stopped(stop["told"], stop["status"])
    return Stopped(f"stopped by {_name(number)} before the first step", 128 + number)


def find_failure(folder: Path, ends: Mapping[int, int]) -> LuthierError:
    """Return the error that ended a launch; of several, one that is not only about another process."""
    errors = _read(folder, "error")
    own = [errors[rank] for rank in (*ends, *errors) if rank in errors and errors[rank]["code"] != "distributed-lost"]
    if own:
        return LuthierError(**own[0])
    killed = {rank: -code for rank, code in ends.items() if code < 0 and -code != signal.SIGTERM}
    rank, code = next(iter((killed or {rank: -code for rank, code in ends.items()}).items()))
    how = f"was ended by {_name(code)}" if code > 0 else f"ended with status {-code}"
    problem = f"process {rank} {how}; the run's newest checkpoint is complete"
    return LuthierError("distributed-lost", problem, remedy="Run the same command again, or give --max-restarts.")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(folder: Path, kind: str) -> dict[int, dict[str, Any]]:
    paths = {int(path.stem.removeprefix(f"{kind}-")): path for path in folder.glob(f"{kind}-*.json")}
    return {rank: json.loads(path.read_text("utf-8")) for rank, path in sorted(paths.items())}
