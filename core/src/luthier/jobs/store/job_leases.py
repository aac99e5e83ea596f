"""Leases: one process at a time acts for a job. A lease ends by itself if its process dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from luthier.errors import LuthierError
from luthier.jobs.clock import Clock
from luthier.jobs.store.job_store import JobStore

SECONDS: Final = 900.0


@asynccontextmanager
async def hold_lease(store: JobStore, id: str, clock: Clock) -> AsyncIterator[None]:
    """Hold the job's lease within this context. Raises `job-busy` if another process holds it."""
    owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex[:8]}"
    _take_lease(store, id, owner, clock.now())
    renewing = asyncio.create_task(_renew_lease(store, id, owner, clock))
    try:
        yield
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        with store.database.write() as connection:
            connection.execute(
                "UPDATE jobs SET owner = NULL, lease_until = NULL WHERE id = ? AND owner = ?", (id, owner)
            )


def _take_lease(store: JobStore, id: str, owner: str, now: float) -> None:
    with store.database.write() as connection:
        row = connection.execute("SELECT owner, lease_until FROM jobs WHERE id = ?", (id,)).fetchone()
        if row["owner"] and row["lease_until"] > now and not _has_ended(row["owner"]):
            holder = " ".join(row["owner"].split()[:2])
            raise LuthierError("job-busy", f"process {holder} acts for this job", where=id)
        connection.execute("UPDATE jobs SET owner = ?, lease_until = ? WHERE id = ?", (owner, now + SECONDS, id))


async def _renew_lease(store: JobStore, id: str, owner: str, clock: Clock) -> None:
    """Extend the lease for as long as its holder lives, in real time, whatever the job's clock says."""
    while True:
        await asyncio.sleep(SECONDS / 3)
        with store.database.write() as connection:
            values = (clock.now() + SECONDS, id, owner)
            connection.execute("UPDATE jobs SET lease_until = ? WHERE id = ? AND owner = ?", values)


def _has_ended(owner: str) -> bool:
    """Return True if the owner was a process of this machine and has ended."""
    host, process, _ = owner.split()
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
