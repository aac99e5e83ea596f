"""Sizes in bytes, as people read them."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Return the bytes with a unit: `1.4 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
