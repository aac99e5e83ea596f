"""The lock of a run's folder, by which only one process trains there. Its file names the owner."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, TextIO

from luthier.disk import is_full
from luthier.errors import LuthierError, unwritable_path
from luthier.logs import get_logger

log = get_logger()
LOCK: Final = "lock"
OWNER: Final = re.compile(r"pid (\d+) on (\S+)")
# seconds: `luthier runs` holds a lock for microseconds while it looks for the owner
PAUSES: Final = (0.005, 0.01, 0.02)
WITHOUT_LOCKS: Final = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of network file systems that keep no locks
# errors if the file may only be read: NFS then refuses to say who holds the lock
UNANSWERED: Final = (*WITHOUT_LOCKS, errno.EBADF)
LONGEST: Final = 1024  # characters of the owner's text
ON_WINDOWS: Final = os.name == "nt"  # on Windows nobody else can read the first byte of a file while it is locked


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within this context. Raises `run-folder-locked` if another process holds it.

    The lock of a dead process of this machine is taken over: a child of that process may still hold the lock itself,
    and on a file system without locks only the name in the file says who trains.
    """
    file = _opened(folder)
    try:
        if not _take(file):
            file = _taken_over(file, folder)
        sign_lock(file, folder)
        try:
            yield
        finally:
            file.truncate(0)  # the owner's name goes with the lock
    finally:
        with contextlib.suppress(OSError):  # closing writes again what a full disk has refused
            file.close()


def _opened(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("a+")
    except OSError as error:
        raise unwritable_path(folder, error) from None


def _take(file: TextIO) -> bool:
    """Return True if the lock is now this process's; False if another process holds it, or may hold it."""
    try:
        return take_lock(file)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return not read_owner(file)


def take_lock(file: IO[str] | IO[bytes]) -> bool:
    """Lock an open file until it is closed and return True; return False if another process holds the lock.

    A process that only looks holds the lock for microseconds, so this one tries several times. Raises `OSError`, with
    an `errno` in `WITHOUT_LOCKS` if the file system keeps no locks.
    """
    from filelock import lock_descriptor  # the import takes a tenth of a second, because it loads asyncio

    for pause in PAUSES:
        if lock_descriptor(file.fileno(), blocking=False):
            return True
        time.sleep(pause)
    return lock_descriptor(file.fileno(), blocking=False)


def _taken_over(file: TextIO, folder: Path) -> TextIO:
    """Take over the lock of a process that has ended, and return it in a new file.

    Raises `run-folder-locked` if that process lives, or may live.
    """
    owner = read_owner(file)
    match = OWNER.search(owner)
    if match is None or _may_live(match):
        away = match is not None and match[2] != socket.gethostname()
        remedy = f"If that process has ended, remove {folder / LOCK}." if away else None
        problem = f"held by {owner or 'another process'}"
        raise LuthierError("run-folder-locked", problem, where=str(folder), remedy=remedy)
    log.warning("took over the lock of a process that has ended", owner=owner, folder=str(folder))
    aside = folder / f".{LOCK}.{os.getpid()}"
    fresh = aside.open("a+")
    with contextlib.suppress(OSError):
        take_lock(fresh)
    os.replace(aside, folder / LOCK)
    file.close()
    return fresh


def sign_lock(file: TextIO, folder: Path) -> None:
    """Write this process into its lock as the owner."""
    file.seek(0)
    file.truncate(0)
    try:
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    except OSError as error:
        if is_full(error):
            raise LuthierError("disk-full", "no room to begin", where=str(folder)) from error
        raise


def read_owner(file: TextIO) -> str:
    """Return the text that names the owner; empty if nobody has the lock."""
    file.seek(1 if ON_WINDOWS else 0)
    text = file.read(LONGEST).strip()
    return f"p{text}" if ON_WINDOWS and text else text


def is_lock_held(path: Path) -> bool:
    """Return True if a living process holds the lock of this file.

    The lock alone does not always say so: a child of a dead process may still hold it, some file systems keep no locks,
    and NFS shows none of a file that may only be read, as another user's run. Then the process in the owner's text
    decides.
    """
    owner = None
    try:
        with open_lock(path) as file:
            owner = OWNER.search(read_owner(file))
            if take_lock(file):
                return False
    except OSError as error:
        return error.errno in UNANSWERED and owner is not None and _may_live(owner)
    return owner is None or _may_live(owner)


def open_lock(path: Path) -> TextIO:
    """Open a lock file to look at it: for writing, which NFS requires of an exclusive lock, or else for reading."""
    try:
        return path.open("r+", encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return path.open(encoding="utf-8", errors="replace")


def _may_live(owner: re.Match[str]) -> bool:
    """Return False if the owner was a process of this machine and has ended."""
    return owner[2] != socket.gethostname() or process_lives(int(owner[1]))


def process_lives(pid: int) -> bool:
    """Return True if a process of this machine lives.

    On Windows always True, because there a lock ends with its process.
    """
    if ON_WINDOWS:
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
