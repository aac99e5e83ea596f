"""The words that the desk of another machine is asked with, and what it answers: one document of JSON."""

from __future__ import annotations

import json
from typing import Any, Final

from luthier.jobs.provider_error import CODES, ProviderError

DESK: Final = "luthier.builtin.workers.worker_desk"
MARK: Final = "luthier-desk:"  # begins the line of the answer, as a shell may write others before it


def desk_words(act: str, folder: str, *more: str) -> list[str]:
    """Return the arguments of the Python over there that ask its desk for an act on a job's folder.

    Acts are check, start, run, status, events, cancel, artifacts and list.
    """
    return ["-m", DESK, act, folder, *more]


def read_desk(text: str, where: str) -> Any:
    """Return what a desk answered, or raise the error that it told."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    try:
        answer = json.loads(lines[-1].removeprefix(MARK))
    except (IndexError, ValueError):
        problem = f"the machine did not answer as Luthier does: {text.strip()[-200:] or 'it said nothing'}"
        raise ProviderError("protocol", problem, where=where) from None
    error = answer.get("error")
    if error is not None:
        kind = error["kind"] if error["kind"] in CODES else "server"
        raise ProviderError(kind, error["message"], where=where)
    return answer["value"]
