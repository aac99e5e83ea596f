"""Orphans: a process whose launcher has died saves and ends; none is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Final

from luthier.logs import get_logger

log = get_logger()
PDEATHSIG: Final = 1  # prctl: the signal that the kernel sends when the parent is gone
LOOK: Final = 1.0  # seconds between two looks at the parent
GRACE: Final = 300.0  # seconds for the step and its checkpoint, once the parent is gone


def is_launched() -> bool:
    """Return True if torchrun's agent, ours or the user's, has started this process."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID"))


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, where it can."""
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def guard_orphan() -> Iterator[None]:
    """Within it the launcher's end is this process's end, even where it hangs: SIGTERM first, and then no mercy."""
    if not is_launched():
        yield
        return
    over, parent = threading.Event(), os.getppid()

    def watch() -> None:
        while not over.wait(LOOK):
            if os.getppid() != parent:
                log.error("the launcher is gone: saving and ending")
                os.kill(os.getpid(), signal.SIGTERM)
                if not over.wait(GRACE):
                    os._exit(128 + signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="luthier-launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
