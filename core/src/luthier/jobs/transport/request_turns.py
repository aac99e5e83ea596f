"""The turns of requests to a service, shared by every process that uses one folder of jobs."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from luthier.errors import LuthierError

LONGEST: Final = 600.0  # seconds; a next turn further ahead was written by a clock that has been set back since
PATIENCE: Final = 10.0  # seconds that a process waits for another one's reservation
TABLE: Final = "CREATE TABLE IF NOT EXISTS turns (service TEXT PRIMARY KEY, next REAL NOT NULL)"


class RequestTurns:
    """The moment of the next request to each service, kept in memory, or in `folder` for several processes.

    Moments are seconds since 1970. The file is not synchronised to disk: after a power failure a service is asked
    at most one request too early.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / "turns.sqlite"
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def reserve_turn(self, service: str, now: float, gap: float) -> float:
        """Take the next turn of a service whose turns are `gap` seconds apart, and return the seconds until it.

        Raises `job-store-damaged` if the file cannot be used.
        """
        with self._opened() as connection:
            begin = self._turn_after(connection, service, now)
            self._write_next(connection, service, begin + gap)
        return begin - now

    def hold_back(self, service: str, now: float, seconds: float) -> None:
        """Let no request to a service begin for so many seconds, as the service has asked."""
        until = now + min(seconds, LONGEST)
        with self._opened() as connection:
            if self._turn_after(connection, service, now) < until:
                self._write_next(connection, service, until)

    def _turn_after(self, connection: sqlite3.Connection | None, service: str, now: float) -> float:
        if connection is None:
            planned = self._next.get(service, now)
        else:
            row = connection.execute("SELECT next FROM turns WHERE service = ?", (service,)).fetchone()
            planned = row[0] if row else now
        return planned if now < planned <= now + LONGEST else now

    def _write_next(self, connection: sqlite3.Connection | None, service: str, moment: float) -> None:
        if connection is None:
            self._next[service] = moment
        else:
            connection.execute("INSERT OR REPLACE INTO turns VALUES (?, ?)", (service, moment))

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection | None]:
        """Hold the turns for one reservation, which no other thread or process can enter meanwhile."""
        with self._lock:
            if self._path is None:
                yield None
                return
            try:
                with closing(sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)) as connection:
                    connection.execute("PRAGMA synchronous = OFF")
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute(TABLE)
                    yield connection
                    connection.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                remedy = "Delete this file, which holds no job."
                raise LuthierError("job-store-damaged", str(error), where=str(self._path), remedy=remedy) from None


_TURNS: ContextVar[RequestTurns | None] = ContextVar("luthier_turns", default=None)


def current_turns() -> RequestTurns:
    """Return the turns that `use_turns` has set here, or new ones that nobody shares."""
    return _TURNS.get() or RequestTurns()


@contextmanager
def use_turns(turns: RequestTurns) -> Iterator[None]:
    """Let every client that is made within this context take its turns from `turns`."""
    token = _TURNS.set(turns)
    try:
        yield
    finally:
        _TURNS.reset(token)
