"""A clock that advances by itself when somebody sleeps, so that tests of waits take no time."""

from __future__ import annotations

import asyncio


class VirtualClock:
    """A time that only sleeping advances. `slept` lists every wait, in seconds."""

    def __init__(self, start: float = 1_795_000_000.0) -> None:
        self.time, self.slept = start, list[float]()

    def now(self) -> float:
        """Return seconds since 1970."""
        return self.time

    def monotonic(self) -> float:
        """Return the same time."""
        return self.time

    async def sleep(self, seconds: float) -> None:
        """Advance time at once, and let other tasks run."""
        self.slept.append(seconds)
        self.time += max(seconds, 0.0)
        await asyncio.sleep(0)
