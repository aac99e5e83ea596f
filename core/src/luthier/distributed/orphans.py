"""Orphans: a process whose launcher has died saves and ends, so that none is left behind."""

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
PDEATHSIG: Final = 1  # prctl's number for the signal that the kernel sends when the parent ends
LOOK: Final = 1.0  # seconds between two looks at the parent
GRACE: Final = 300.0  # seconds for the step and its checkpoint after the parent has ended


def is_launched() -> bool:
    """Return True if torchrun's agent, ours or the user's, has started this process."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID"))


def follow_launcher() -> None:
    """Ask the kernel to send SIGTERM when the launcher ends, on systems where it can."""
    if is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def guard_orphan() -> Iterator[None]:
    """End this process when its launcher ends within this context, even if it hangs: by SIGTERM, then SIGKILL."""
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
