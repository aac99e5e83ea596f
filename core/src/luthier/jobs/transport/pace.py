"""The pace of requests to one service: how many a second, and how many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from luthier.jobs.clock import Clock
from luthier.jobs.transport.request_turns import RequestTurns


class Pace:
    """A limiter that spaces the requests to `service` evenly: `rate` a second, at most `together` at a time.

    The rate holds over every client that takes its turns from the same `turns`; `together` is this client's own.
    """

    def __init__(self, clock: Clock, service: str, rate: float, together: int, turns: RequestTurns) -> None:
        self._clock, self._service, self._gap, self._turns = clock, service, 1.0 / rate, turns
        self._places = asyncio.Semaphore(together)

    @asynccontextmanager
    async def take_turn(self) -> AsyncIterator[None]:
        """Wait for a turn; within this context one request may be sent."""
        async with self._places:
            wait = self._turns.reserve_turn(self._service, self._clock.now(), self._gap)
            if wait > 0:
                await self._clock.sleep(wait)
            yield

    def hold_back(self, seconds: float) -> None:
        """Let nobody who shares these turns begin a request for so many seconds, as the service has asked."""
        self._turns.hold_back(self._service, self._clock.now(), seconds)
