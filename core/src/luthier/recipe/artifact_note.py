"""The note beside an artifact, as a recipe needs it: which base and parts it names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError, refuse_newer

RECORD: Final = "run.json"


NOTE: Final = "luthier.json"  # beside an artifact: which base and parts it needs


NOTE_FORMAT: Final = 1  # of the note, as this luthier writes it


ARTIFACTS: Final = ("adapter", "model", "merged")  # folders of a run, the first that is there counts


def read_note(folder: Path) -> dict[str, Any]:
    """Return what stands beside an artifact; nothing where there is none."""
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict):
        return {}
    refuse_newer(note, NOTE_FORMAT, folder / NOTE)
    return note if isinstance(note.get("model"), dict) else {}


def find_artifact(name: str) -> Path | None:
    """Return the folder of an artifact, where a name is that or a run's folder; None for anything else."""
    folder = Path(os.path.expanduser(name))
    if (folder / RECORD).is_file():
        return _artifact_of(folder)
    return folder if (folder / NOTE).is_file() else None


def _artifact_of(folder: Path) -> Path:
    for name in ARTIFACTS:
        if (folder / name).is_dir():
            return folder / name
    remedy = "Finish it with the command that began it."
    raise LuthierError("artifact-not-found", "the run has no artifact yet", where=str(folder), remedy=remedy)
