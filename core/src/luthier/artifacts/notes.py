"""The note beside an adapter: which base, adapter and quantizer it needs, and which run made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.engine.run import read_record
from luthier.errors import LuthierError


def note(settings: dict[str, Any], run_id: str, parts: list[dict[str, Any]], template: str | None) -> dict[str, Any]:
    """`settings` is the resolved recipe as plain data; `template` the hash of the chat template trained on."""
    needed = {kind: settings[kind] for kind in ("model", "adapter", "quantizer")}
    return {"format": 1, **needed, "run_id": run_id, "parts": parts, "chat_template_hash": template}


def of_run(folder: Path) -> dict[str, Any]:
    """The note that a run keeps in its record."""
    record = read_record(folder)
    if record is None:
        raise LuthierError("run-not-found", "no run.json here", where=str(folder))
    return record["note"]
