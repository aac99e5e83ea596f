"""One worker of Ray Train: it starts one process of the run, and watches it. Ray calls it on the workers' nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

STOP: Final = "stop"  # this file asks every process to save and end
RANKS: Final = "ranks"  # the folder of what each process wrote
STARTS: Final = "starts"  # this file counts how often the workers were started
LOOK: Final = 1.0  # seconds between looks at the file


def train_rank(config: Mapping[str, str]) -> None:
    """Run this worker's process to its end. Raises `RuntimeError` if it failed, so that Ray Train decides what follows.

    `config` has the run's `name`, and the path of its `recipe` in a folder that the workers share.
    """
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context, place = get_context(), Path(config["recipe"]).parent
    rank = context.get_world_rank()
    meeting = broadcast_from_rank_zero(_choose_meeting(place) if rank == 0 else None)
    environment = {
        **os.environ,
        **meeting,
        "RANK": str(rank),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "TORCHELASTIC_RUN_ID": config["name"],  # a process that was launched ends with its launcher
    }
    code = _run_process(config["recipe"], place, rank, environment)
    if code and not (place / STOP).exists():
        raise RuntimeError(f"process {rank} ended with status {code}")


def _choose_meeting(place: Path) -> dict[str, str]:
    """Return where the processes meet: a free port of rank 0's node; and how often they were started before."""
    from ray.util import get_node_ip_address

    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    starts = place / STARTS
    before = int(starts.read_text()) if starts.exists() else 0
    starts.write_text(str(before + 1))
    return {
        "MASTER_ADDR": get_node_ip_address(),
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(before),
    }


def _run_process(recipe: str, place: Path, rank: int, environment: Mapping[str, Any]) -> int:
    """Return the exit status of the training, which gets the stop signal as soon as the file is there."""
    (place / RANKS).mkdir(exist_ok=True)
    words = [sys.executable, "-m", "luthier", "train", recipe, "--json"]
    output, errors = place / RANKS / f"{rank}.out", place / RANKS / f"{rank}.err"
    stopped = False
    with (
        output.open("wb") as out,
        errors.open("wb") as err,
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=dict(environment)) as process,
    ):
        while True:
            try:
                return process.wait(timeout=LOOK)
            except subprocess.TimeoutExpired:
                if not stopped and (place / STOP).exists():
                    process.send_signal(signal.SIGTERM)
                    stopped = True
