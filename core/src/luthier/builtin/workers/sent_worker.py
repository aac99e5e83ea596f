"""The worker of a run that was sent whole: `python -m luthier.builtin.workers.sent_worker run FOLDER [PARCEL]`.

It unpacks the parcel, of a file or of the environment, trains, and tells on standard output what it has measured and
how it ended. `give FOLDER` writes a folder out as one packed line.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, Final

from luthier.builtin.local import KINDS, read_reason
from luthier.builtin.workers.local_worker import ERRORS, LAUNCH, OUTPUT, read_worker_note
from luthier.jobs.desk.metric_lines import read_fresh_lines
from luthier.jobs.desk.sent_run import VARIABLE, join_parcel, write_told
from luthier.jobs.transport.archive import unpack_archive
from luthier.runs.run_folder import METRICS, read_folder

LOOK: Final = 1.0  # seconds between looks at the metrics
RANKS: Final = ("PET_NODE_RANK", "JOB_COMPLETION_INDEX")


class ToldMetrics:
    """The metrics of a run's folder, told line by line as they are written."""

    def __init__(self, run: Path) -> None:
        self.run, self.offset = run, 0
        self.total: int | None = None

    def tell_fresh(self) -> None:
        """Tell the whole lines that have come since the last time."""
        total = read_folder(self.run).total_steps if self.total is None else None
        if total is not None:
            self.total = total
            _tell(total_steps=total)
        fresh = read_fresh_lines(self.run / METRICS, self.offset)
        self.offset = fresh.offset
        for line in fresh.lines:
            _tell(line=line.decode("utf-8", "replace"))


def run_sent(folder: Path, parcel: Path | None) -> int:
    """Train from a parcel, and return the exit status of the training."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    archive = folder / "parcel.tar.gz"
    archive.write_bytes(join_parcel(os.environ) if parcel is None else parcel.read_bytes())
    unpack_archive(archive, folder)
    launch = read_worker_note(folder / LAUNCH) or {}
    run = Path(launch["run"])
    metrics = ToldMetrics(run) if _is_first_node() else None
    with (folder / OUTPUT).open("wb") as output, (folder / ERRORS).open("wb") as errors:
        words = [sys.executable, *launch["arguments"]]
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=_own_environment()
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda given, _: process.send_signal(given))
        code = _watch(process, metrics)
    if metrics is not None:
        results = {kind: str(run / kind) for kind in KINDS if (run / kind).is_dir()}
        _tell(code=code, reason=read_reason(folder) if code else None, results=results)
    return code if code >= 0 else 128 - code


def give_folder(folder: Path) -> int:
    """Write a folder as a packed tar in one line."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder, arcname=".")
    _tell(archive=base64.b64encode(packed.getvalue()).decode())
    return 0


def _watch(process: subprocess.Popen[bytes], metrics: ToldMetrics | None) -> int:
    while True:
        try:
            code: int | None = process.wait(timeout=LOOK)
        except subprocess.TimeoutExpired:
            code = None
        if metrics is not None:
            metrics.tell_fresh()
        if code is not None:
            return code


def _own_environment() -> dict[str, str]:
    """Return the environment without the parcel, of which the training knows nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith(VARIABLE)}


def _is_first_node() -> bool:
    """Return False on the other nodes of a run of several, which would tell the same."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _tell(**values: Any) -> None:
    print(write_told(at=time.time(), **values), flush=True)


def main(words: list[str]) -> int:
    act, folder, *more = words
    if act == "give":
        return give_folder(Path(folder))
    return run_sent(Path(folder), Path(more[0]) if more else None)


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
