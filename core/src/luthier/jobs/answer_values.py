"""Readers of single values in a service's answers, which may be missing, null, or written as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from luthier.jobs.provider_error import ProviderError


def read_number(value: object) -> float | None:
    """Return a number, which may be written as text; None if it is no number or not finite."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def require_text(answer: Mapping[str, Any], name: str) -> str:
    """Return a value without which an answer describes no job, as text. Raises `provider-protocol` if it is missing."""
    value = answer.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ProviderError("protocol", f"the service's answer is no job, as it has no {name!r}", found=value)
    return str(value)


def read_time(value: object) -> float | None:
    """Return a moment in seconds since 1970, read from an ISO date or from such seconds; None if it is neither."""
    number = read_number(value)
    if number is not None or not isinstance(value, str):
        return number
    try:
        return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def elapsed_seconds(begun: float | None, ended: float | None) -> float | None:
    """Return the seconds between two moments; None if one of them is not known."""
    return None if begun is None or ended is None else max(ended - begun, 0.0)


def drop_missing(**values: Any) -> dict[str, Any]:
    """Return the values that are not None, by name, so that a request holds only what was set."""
    return {name: value for name, value in values.items() if value is not None}
