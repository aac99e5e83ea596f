"""The lock of a run's folder: one process trains there; its file names the owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from luthier.disk import is_full
from luthier.errors import LuthierError, unwritable_path
from luthier.logs import get_logger

log = get_logger()
LOCK: Final = "lock"
OWNER: Final = re.compile(r"pid (\d+) on (\S+)")
PAUSES: Final = (0.005, 0.01, 0.02)  # `luthier runs` holds it for microseconds where it looks for owners
WITHOUT_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of network file systems


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; `run-folder-locked` where another process holds it.

    What a dead process of this machine left behind is taken over: a child of it may still hold the lock itself, and
    where a file system keeps no locks its name alone says who trains.
    """
    file = _opened(folder)
    try:
        if not _take(file):
            file = _taken_over(file, folder)
        _sign(file, folder)
        try:
            yield
        finally:
            file.truncate(0)  # the owner's name goes with the lock
    finally:
        with contextlib.suppress(OSError):  # closing writes what a full disk has refused
            file.close()


def _opened(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("a+")
    except OSError as error:
        raise unwritable_path(folder, error) from None


def _take(file: TextIO) -> bool:
    """Whether the lock is this process's now; False where another holds it, or may hold it."""
    for pause in (*PAUSES, None):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if pause is not None:
                time.sleep(pause)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            return not _owner(file)
    return False


def _taken_over(file: TextIO, folder: Path) -> TextIO:
    """The lock of a process that has ended, in a new file; `run-folder-locked` where it has not, or cannot be known."""
    owner = _owner(file)
    match = OWNER.search(owner)
    here = match is not None and match[2] == socket.gethostname()
    if match is None or not here or process_lives(int(match[1])):
        away = match is not None and not here
        remedy = f"If that process has ended, remove {folder / LOCK}." if away else None
        problem = f"held by {owner or 'another process'}"
        raise LuthierError("run-folder-locked", problem, where=str(folder), remedy=remedy)
    log.warning("took over the lock of a process that has ended", owner=owner, folder=str(folder))
    aside = folder / f".{LOCK}.{os.getpid()}"
    fresh = aside.open("a+")
    with contextlib.suppress(OSError):
        fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(aside, folder / LOCK)
    file.close()
    return fresh


def _sign(file: TextIO, folder: Path) -> None:
    file.seek(0)
    file.truncate(0)
    try:
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    except OSError as error:
        if is_full(error):
            raise LuthierError("disk-full", "no room to begin", where=str(folder)) from error
        raise


def _owner(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip()


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
