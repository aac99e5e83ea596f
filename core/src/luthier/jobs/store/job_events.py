"""Events in the store: each is stored once, in the order of arrival, with the cursor for the next reading."""

from __future__ import annotations

import json
import math

import attrs

from luthier.jobs.secret import redact_text
from luthier.jobs.store.job_store import JobStore
from luthier.plugins.providing.job_records import EventPage, JobEvent, from_plain_data


def keep_events(store: JobStore, id: str, page: EventPage) -> list[JobEvent]:
    """Store a page and its cursor in one transaction, and return the events that were not known before."""
    fresh = []
    with store.database.write() as connection:
        for event in map(_cleaned, page.events):
            values = (id, event.id, json.dumps(attrs.asdict(event)))
            done = connection.execute("INSERT OR IGNORE INTO events (job, id, event) VALUES (?,?,?)", values)
            if done.rowcount:
                fresh.append(event)
        if page.cursor is not None:
            connection.execute("UPDATE jobs SET cursor = ? WHERE id = ?", (page.cursor, id))
    return fresh


def read_cursor(store: JobStore, id: str) -> str | None:
    """Return the cursor at which the next page of a job's events begins; None before the first."""
    rows = store.database.read("SELECT cursor FROM jobs WHERE id = ?", (id,))
    return rows[0]["cursor"] if rows else None


def read_events(store: JobStore, id: str, after: int = 0) -> tuple[list[JobEvent], int]:
    """Return a job's events after a number, oldest first, and the number of the last one."""
    query = "SELECT number, event FROM events WHERE job = ? AND number > ? ORDER BY number"
    rows = store.database.read(query, (id, after))
    events = [from_plain_data(json.loads(row["event"]), JobEvent, "the store's event") for row in rows]
    return events, rows[-1]["number"] if rows else after


def _cleaned(event: JobEvent) -> JobEvent:
    """Return the event redacted; numbers that JSON does not have, such as NaN, become None."""
    numbers = {k: v if v is not None and math.isfinite(v) else None for k, v in event.metrics.items()}
    return attrs.evolve(event, message=redact_text(event.message), metrics=numbers)
