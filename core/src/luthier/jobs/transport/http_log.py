"""The HTTP library's own log lines, without keys and without signed links' queries."""

from __future__ import annotations

import logging
from typing import Final

from luthier.jobs.secret import redact_text

LOGGERS: Final = (
    "httpx",
    *(f"httpcore.{name}" for name in ("connection", "http11", "http2", "proxy", "socks")),
)


class RedactingFilter(logging.Filter):
    """A filter that redacts log records, because httpx writes full links, signatures included, at INFO."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_text(record.getMessage()), ()
        return True


def guard_loggers() -> None:
    """Put the filter on each of the library's loggers, once."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(present, RedactingFilter) for present in logger.filters):
            logger.addFilter(RedactingFilter())
