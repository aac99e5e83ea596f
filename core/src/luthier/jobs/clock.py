"""The clock by which waits are measured. Tests replace it by one that they can set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Clock(Protocol):
    """The time of day, a time that never goes back, and sleep."""

    def now(self) -> float:
        """Return seconds since 1970."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary moment; they never decrease."""

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


_CLOCK: ContextVar[Clock | None] = ContextVar("luthier_clock", default=None)


def current_clock() -> Clock:
    """Return the clock that `use_clock` has set here, or the machine's own."""
    return _CLOCK.get() or SystemClock()


@contextmanager
def use_clock(clock: Clock) -> Iterator[None]:
    """Let everything that is made within this context measure time by `clock`."""
    token = _CLOCK.set(clock)
    try:
        yield
    finally:
        _CLOCK.reset(token)
