"""The protocol of the desk on another machine: the arguments that ask it, and its answer, one JSON document."""

from __future__ import annotations

import json
from typing import Any, Final

from luthier.jobs.provider_error import CODES, ProviderError

DESK: Final = "luthier.builtin.workers.worker_desk"
MARK: Final = "luthier-desk:"  # begins the answer's line, because a shell may print other lines before it


def desk_words(act: str, folder: str, *more: str) -> list[str]:
    """Return the arguments of the remote Python by which its desk is asked to act on a job's folder.

    Acts are check, start, run, status, events, cancel, artifacts and list.
    """
    return ["-m", DESK, act, folder, *more]


def read_desk(text: str, where: str) -> Any:
    """Return a desk's answer, or raise the error that the answer describes."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    try:
        answer = json.loads(lines[-1].removeprefix(MARK))
    except (IndexError, ValueError):
        problem = f"the machine's answer is not Luthier's: {text.strip()[-200:] or 'nothing'}"
        raise ProviderError("protocol", problem, where=where) from None
    error = answer.get("error")
    if error is not None:
        kind = error["kind"] if error["kind"] in CODES else "server"
        raise ProviderError(kind, error["message"], where=where)
    return answer["value"]
