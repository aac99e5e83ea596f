"""The SQLite file: its path, its tables, and transactions that several processes may start at once."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from luthier.errors import LuthierError, unwritable_path

VARIABLE: Final = "LUTHIER_JOBS"
VERSION: Final = 1
PATIENCE: Final = 30.0  # seconds that a writer waits for another writer
TABLES: Final = """
CREATE TABLE jobs (
  id TEXT PRIMARY KEY, provider TEXT NOT NULL, scope TEXT NOT NULL,
  spec TEXT NOT NULL, stage TEXT NOT NULL, state TEXT NOT NULL,
  raw_state TEXT, phase TEXT, reason TEXT, remote_id TEXT, status TEXT, uploads TEXT NOT NULL DEFAULT '{}',
  cancel_requested REAL, updated REAL NOT NULL, cursor TEXT, owner TEXT, lease_until REAL);
CREATE UNIQUE INDEX remote_jobs ON jobs (provider, scope, remote_id) WHERE remote_id IS NOT NULL;
CREATE INDEX job_states ON jobs (state, provider);
CREATE TABLE journal (number INTEGER PRIMARY KEY, job TEXT NOT NULL, at REAL NOT NULL, step TEXT NOT NULL,
  detail TEXT NOT NULL);
CREATE INDEX journal_jobs ON journal (job, number);
CREATE TABLE events (number INTEGER PRIMARY KEY, job TEXT NOT NULL, id TEXT NOT NULL, event TEXT NOT NULL,
  UNIQUE (job, id));
CREATE TABLE uploads (scope TEXT NOT NULL, sha256 TEXT NOT NULL, remote_id TEXT NOT NULL, PRIMARY KEY (scope, sha256));
"""


def default_place() -> Path:
    """Return the folder of the store: `LUTHIER_JOBS`, or the user's own data folder."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "luthier" / "jobs"


class Database:
    """A connection to the file `jobs.sqlite` of a folder, opened at first use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise unwritable_path(folder, error) from None
        self.path = folder / "jobs.sqlite"
        self._connection = self._connect()

    def _connect(self) -> sqlite3.Connection:
        try:
            made = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            made.row_factory = sqlite3.Row
            made.execute("PRAGMA journal_mode = WAL")
            made.execute("PRAGMA synchronous = FULL")  # a committed step of the journal survives a power failure
            self._create_tables(made)
        except sqlite3.DatabaseError as error:
            raise LuthierError("job-store-damaged", f"cannot be read: {error}", where=str(self.path)) from None
        return made

    def _create_tables(self, made: sqlite3.Connection) -> None:
        made.execute("BEGIN IMMEDIATE")
        try:
            (version,) = made.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                problem, remedy = "was written by a newer Luthier", "Update Luthier, or set LUTHIER_JOBS elsewhere."
                raise LuthierError("job-store-damaged", problem, where=str(self.path), remedy=remedy)
            if version == 0:
                for statement in TABLES.split(";\n"):
                    made.execute(statement)
                made.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            made.execute("ROLLBACK")
            raise
        made.execute("COMMIT")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction that has the file to itself; an exception rolls it back."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def read(self, query: str, values: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()
