"""The rule for sending a request again: when, and after how long."""

from __future__ import annotations

import random
from email.utils import parsedate_to_datetime
from typing import Final

import attrs

PASSING: Final = frozenset((408, 429, 500, 502, 503, 504))


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """Full jitter (Brooker, AWS 2015): a wait is drawn from 0 to a bound, which doubles up to `longest`."""

    attempts: int = 6
    first: float = 0.5  # seconds
    longest: float = 30.0
    longest_asked: float = 120.0  # seconds: the longest wait that a service may ask for

    def draw_wait(self, attempt: int, generator: random.Random) -> float:
        """Return the seconds to wait after the attempt with this number, from 1."""
        return generator.uniform(0.0, min(self.longest, self.first * 2 ** (attempt - 1)))


def read_retry_after(text: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date; None if it says neither."""
    if not text:
        return None
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(text).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):
        return None
