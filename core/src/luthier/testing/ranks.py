"""Several ranks for a test: processes forked from this one, joined by gloo, whose answers come back as plain data."""

from __future__ import annotations

import os
import select
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds after which a silent rank counts as lost


def in_ranks(size: int, work: Callable[..., Any], *arguments: Any, joined: bool = True) -> list[Any]:
    """Return what `work(*arguments)` returns on each of `size` ranks, in their order.

    An answer is a tree of mappings, lists, tensors, numbers and texts. Forked processes inherit what is imported here;
    they need one torch thread. With `joined` False, they only get a launcher's environment, and join by themselves.
    Raises AssertionError with the traceback of the first rank that failed. Linux only.
    """
    from luthier.state_tree import load_state

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = None if joined else _free_port()
        children = [_forked(rank, size, folder, lambda: work(*arguments), port) for rank in range(size)]
        statuses = _statuses(children)
        failed = [(folder / f"error-{rank}") for rank in range(size) if (folder / f"error-{rank}").exists()]
        assert not failed, "\n".join(path.read_text() for path in failed)
        assert statuses == [0] * size, f"ranks ended with {statuses}"
        return [load_state(folder / f"answer-{rank}")["answer"] for rank in range(size)]


def _statuses(children: list[int]) -> list[int]:
    """Return how each child has ended. If one fails, the others are killed, as they may wait for it."""
    ends = {os.pidfd_open(child): child for child in children}
    statuses: dict[int, int] = {}
    while len(statuses) < len(ends):
        ready, _, _ = select.select([end for end, child in ends.items() if child not in statuses], [], [])
        for child in (ends[end] for end in ready):
            statuses[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if statuses[child]:
                for other in set(children) - statuses.keys():
                    os.kill(other, signal.SIGKILL)
    for end in ends:
        os.close(end)
    return [statuses[child] for child in children]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _forked(rank: int, size: int, folder: Path, work: Callable[[], Any], port: int | None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _answer(rank, size, folder, work, port)
        status = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        os._exit(status)  # without the parent's exit handlers


def _answer(rank: int, size: int, folder: Path, work: Callable[[], Any], port: int | None) -> None:
    import torch
    import torch.distributed as dist

    from luthier.logs import set_up
    from luthier.state_tree import save_state

    torch.set_num_threads(1)  # creates the thread pool anew, as threads that load a model would race to create it

    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in environment.items()})
    set_up("warning")
    if port is None:
        _join(rank, size, folder)
    else:
        os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    answer = work()
    (folder / f"answer-{rank}").mkdir()
    save_state({"answer": answer}, folder / f"answer-{rank}")
    if port is None:
        dist.barrier()  # no rank leaves while another still communicates
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, size: int, folder: Path) -> None:
    import torch.distributed as dist

    from luthier.distributed import store as notes

    store = dist.FileStore(str(folder / "store"), size)
    notes.keep_store(store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
