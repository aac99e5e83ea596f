"""Launching: several processes of one command, started, watched and restarted by torchrun's own agent."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.distributed import outcome
from luthier.errors import LuthierError

GRACE: Final = "600"  # seconds in which processes that are asked to end may write their last checkpoint
ELASTIC: Final = "torch.distributed.elastic"
QUIET: Final = (
    "torch.distributed.run",
    *(f"{ELASTIC}.{name}" for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api")),
)


@attrs.frozen(kw_only=True)
class Launch:
    """What torchrun is asked for, in its own words; None: its variable `PET_*`, or its default."""

    nproc_per_node: str | None = None
    nnodes: str | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    max_restarts: int | None = None

    def wanted(self, environ: Mapping[str, str]) -> bool:
        """Return True if processes are to be started here. Raises `distributed-setup` for flags once they are."""
        given = [f.name for f in attrs.fields(Launch) if getattr(self, f.name) is not None]
        if environ.get("TORCHELASTIC_RUN_ID") or environ.get("WORLD_SIZE", "1") != "1":
            if given:
                flag = f"--{given[0].replace('_', '-')}"
                raise _refused(f"{flag} is given to a process that has been launched", "Give it to the launcher alone.")
            return False
        return bool(given) or any(environ.get(f"PET_{name}") for name in ("NPROC_PER_NODE", "NNODES"))

    def value(self, name: str, environ: Mapping[str, str]) -> str | None:
        """A flag before the environment, and that before torchrun's default."""
        given = getattr(self, name)
        return str(given) if given is not None else environ.get(f"PET_{name.upper()}") or None


def arguments(asked: Launch, environ: Mapping[str, str]) -> list[str]:
    """torchrun's command line. Raises `distributed-setup` where the machines could not find each other."""
    given = {f.name: asked.value(f.name, environ) for f in attrs.fields(Launch)}
    if given["rdzv_endpoint"] and (given["master_addr"] or given["master_port"]):
        raise _refused("rdzv_endpoint and master_addr say the same thing twice", "Give one of the two.")
    several, meeting = given["nnodes"] not in (None, "1", "1:1"), given["rdzv_endpoint"] or given["master_addr"]
    if several and not meeting:
        raise _refused(
            f"{given['nnodes']} machines have no place to meet",
            "Give --rdzv-endpoint HOST:PORT (and the same --rdzv-id), or --master-addr HOST and --node-rank N.",
        )
    if several and given["master_addr"] and given["node_rank"] is None:
        raise _refused("machines that meet at a master are numbered by hand", "Give each its --node-rank, from 0.")
    if not meeting:
        given |= {"rdzv_endpoint": "localhost:0", "rdzv_id": given["rdzv_id"] or uuid.uuid4().hex}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    by_hand = meeting and (given["master_addr"] or given["node_rank"])
    backend = environ.get("PET_RDZV_BACKEND") or ("static" if by_hand else "c10d")
    return [*words, f"--rdzv-backend={backend}"]


def launch_flags() -> tuple[str, ...]:
    """Return how these are written on a command line."""
    names = [field.name for field in attrs.fields(Launch)]
    return tuple(f"--{name.replace('_', '-')}" for name in names)


def launch_processes(asked: Launch, command: Sequence[str]) -> Mapping[str, Any]:
    """Run `python command...` in every process that was asked for, to the end, and give rank 0's answer.

    Raises the error that ended the run first: a process's own, or `distributed-lost` naming who was killed; and
    `Stopped` where all of them saved and stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser

    words = [*arguments(asked, os.environ), "--no-python", sys.executable, *command]
    with tempfile.TemporaryDirectory(prefix="luthier-") as name, _surroundings(Path(name)):
        threads = os.environ.get("OMP_NUM_THREADS")
        config, entry, entry_words = config_from_args(_parsed(get_args_parser(), words))
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)  # torchrun has chosen 1; each process chooses for itself
        try:
            elastic_launch(config=config, entrypoint=entry)(*entry_words)
        except ChildFailedError as error:
            raise outcome.find_failure(Path(name), _ends(error.failures)) from None
        except SignalException as error:
            raise outcome.read_stop(Path(name), int(error.sigval)) from None
        return outcome.read_outcome(Path(name))


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """torchrun's own reading; what it refuses is a `LuthierError`, not the end of the process."""

    def refuse(message: str) -> None:
        raise _refused(f"torchrun: {message}", "See --help for these flags.")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    return parser.parse_args(words)


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """What the processes inherit: where they leave their outcome, and time to end; SIGUSR1 is handed on to them."""
    before = dict(os.environ)
    os.environ.update({outcome.FOLDER: str(folder), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": GRACE})
    old = signal.signal(signal.SIGUSR1, lambda number, _: outcome.forward_signal(folder, number))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we say ourselves how it ended
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, old)
        os.environ.clear()
        os.environ.update(before)


def _ends(failures: Mapping[int, Any]) -> dict[int, int]:
    """The exit codes by rank, the first failure first; a negative one is a signal's."""
    return {rank: f.exitcode for rank, f in sorted(failures.items(), key=lambda item: item[1].timestamp)}


def _refused(problem: str, remedy: str) -> LuthierError:
    return LuthierError("distributed-setup", problem, where="launch", remedy=remedy)
