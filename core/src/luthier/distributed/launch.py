"""Launching: several processes of one command, which torchrun's own agent starts, watches and restarts."""

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
    """The requested launch, in torchrun's own words. None means torchrun's variable `PET_*`, or its default."""

    nproc_per_node: str | None = None
    nnodes: str | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    max_restarts: int | None = None

    def wanted(self, environ: Mapping[str, str]) -> bool:
        """Return True if this process must start others.

        Raises `distributed-setup` for such flags in a started process.
        """
        given = [f.name for f in attrs.fields(Launch) if getattr(self, f.name) is not None]
        if environ.get("TORCHELASTIC_RUN_ID") or environ.get("WORLD_SIZE", "1") != "1":
            if given:
                flag = f"--{given[0].replace('_', '-')}"
                raise _refused(f"{flag} is given to a process that has been launched", "Give it to the launcher alone.")
            return False
        return bool(given) or any(environ.get(f"PET_{name}") for name in ("NPROC_PER_NODE", "NNODES"))

    def value(self, name: str, environ: Mapping[str, str]) -> str | None:
        """Return a flag's value: as given, or from the environment, or None for torchrun's default."""
        given = getattr(self, name)
        return str(given) if given is not None else environ.get(f"PET_{name.upper()}") or None


def arguments(asked: Launch, environ: Mapping[str, str]) -> list[str]:
    """Return torchrun's command line. Raises `distributed-setup` if the machines could not find each other."""
    given = {f.name: asked.value(f.name, environ) for f in attrs.fields(Launch)}
    if given["rdzv_endpoint"] and (given["master_addr"] or given["master_port"]):
        raise _refused("rdzv_endpoint and master_addr say the same thing twice", "Give one of the two.")
    several, meeting = given["nnodes"] not in (None, "1", "1:1"), given["rdzv_endpoint"] or given["master_addr"]
    if several and not meeting:
        raise _refused(
            f"{given['nnodes']} machines need an address to meet at",
            "Give --rdzv-endpoint HOST:PORT (and the same --rdzv-id), or --master-addr HOST and --node-rank N.",
        )
    if several and given["master_addr"] and given["node_rank"] is None:
        raise _refused("with a master address each machine needs its number", "Give each its --node-rank, from 0.")
    if not meeting:
        given |= {"rdzv_endpoint": "localhost:0", "rdzv_id": given["rdzv_id"] or uuid.uuid4().hex}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    by_hand = meeting and (given["master_addr"] or given["node_rank"])
    backend = environ.get("PET_RDZV_BACKEND") or ("static" if by_hand else "c10d")
    return [*words, f"--rdzv-backend={backend}"]


def launch_flags() -> tuple[str, ...]:
    """Return the launch flags as they are written on a command line."""
    names = [field.name for field in attrs.fields(Launch)]
    return tuple(f"--{name.replace('_', '-')}" for name in names)


def launch_processes(asked: Launch, command: Sequence[str]) -> Mapping[str, Any]:
    """Run `python command...` in every requested process to its end, and return rank 0's answer.

    Raises the error that ended the run first (a process's own, or `distributed-lost` naming the process that was
    killed), and `Stopped` if all of them saved and stopped.
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
            os.environ.pop("OMP_NUM_THREADS", None)  # torchrun would set 1; each process chooses its own number
        try:
            elastic_launch(config=config, entrypoint=entry)(*entry_words)
        except ChildFailedError as error:
            raise outcome.find_failure(Path(name), _ends(error.failures)) from None
        except SignalException as error:
            raise outcome.read_stop(Path(name), int(error.sigval)) from None
        return outcome.read_outcome(Path(name))


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse as torchrun does, but raise a `LuthierError` for refused words instead of ending the process."""

    def refuse(message: str) -> None:
        raise _refused(f"torchrun: {message}", "See --help for these flags.")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    return parser.parse_args(words)


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """Prepare what the processes inherit: a folder for their outcomes, time to end, and forwarding of SIGUSR1."""
    before = dict(os.environ)
    os.environ.update({outcome.FOLDER: str(folder), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": GRACE})
    old = signal.signal(signal.SIGUSR1, lambda number, _: outcome.forward_signal(folder, number))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # luthier itself reports how the launch ended
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, old)
        os.environ.clear()
        os.environ.update(before)


def _ends(failures: Mapping[int, Any]) -> dict[int, int]:
    """Return the exit codes by rank, the first failure first. A negative code is a signal's number."""
    return {rank: f.exitcode for rank, f in sorted(failures.items(), key=lambda item: item[1].timestamp)}


def _refused(problem: str, remedy: str) -> LuthierError:
    return LuthierError("distributed-setup", problem, where="launch", remedy=remedy)
