"""Signals: what the operating system asks of a run that trains: to save and end, or to save and go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from luthier.runs.writing.run_control import RunControl

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING: Final = signal.SIGUSR1  # schedulers send it some time before they take the machine away


@contextlib.contextmanager
def handle_signals(control: RunControl) -> Iterator[None]:
    """SIGINT, SIGTERM or SIGHUP asks for a stop with a checkpoint, SIGUSR1 for a checkpoint; a second SIGINT ends now.

    Each waits for the end of the step. A SIGHUP that is ignored stays so (`nohup`). Outside the main thread, where
    Python hears no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        if control.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        control.signal = number

    def save(number: int, frame: Any) -> None:
        control.wants_save = True

    wanted = {**dict.fromkeys(ENDING, end), SAVING: save}
    before = {number: signal.getsignal(number) for number in wanted}
    taken = [n for n, old in before.items() if old is not None and (n, old) != (signal.SIGHUP, signal.SIG_IGN)]
    for number in taken:
        signal.signal(number, wanted[number])
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
