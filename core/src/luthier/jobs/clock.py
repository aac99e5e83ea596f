"""The clock that waits are measured by, so that tests can turn it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Clock(Protocol):
    """Time of day, time that never goes back, and sleep."""

    def now(self) -> float:
        """Return seconds since 1970."""

    def monotonic(self) -> float:
        """Return seconds since some moment; they never go back."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


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
    """Return the clock that is set here, or the machine's own."""
    return _CLOCK.get() or SystemClock()


@contextmanager
def use_clock(clock: Clock) -> Iterator[None]:
    """Within it, what is made measures time by this clock."""
    token = _CLOCK.set(clock)
    try:
        yield
    finally:
        _CLOCK.reset(token)
