"""Points in time as files and lines of this library have them, and as templates write them."""

from __future__ import annotations

from datetime import UTC, datetime


def current_time() -> str:
    """Return the time in UTC by RFC 3339, with microseconds, such as `2026-11-28T21:31:32.845530Z`."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def format_now(form: str) -> str:
    """Return the present local time in a format of strftime."""
    return datetime.now().strftime(form)
