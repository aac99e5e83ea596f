"""The pace of requests to one service: how many a second, and how many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from luthier.jobs.clock import Clock


class Pace:
    """A limiter that spaces requests evenly: `rate` a second, at most `together` at a time."""

    def __init__(self, clock: Clock, rate: float, together: int) -> None:
        self._clock, self._gap, self._next = clock, 1.0 / rate, 0.0
        self._places = asyncio.Semaphore(together)

    @asynccontextmanager
    async def take_turn(self) -> AsyncIterator[None]:
        """Wait for a turn; within this context one request may be sent."""
        async with self._places:
            now = self._clock.monotonic()
            wait, self._next = self._next - now, max(self._next, now) + self._gap
            if wait > 0:
                await self._clock.sleep(wait)
            yield
