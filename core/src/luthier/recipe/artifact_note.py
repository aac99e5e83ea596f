"""The note beside an artifact, as a recipe needs it: the base and the parts of the artifact."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError, refuse_newer

RECORD: Final = "run.json"


NOTE: Final = "luthier.json"  # the file beside an artifact that names its base and parts


NOTE_FORMAT: Final = 1  # the version of the note's format that this luthier writes


ARTIFACTS: Final = ("adapter", "model", "merged")  # folders of a run, of which the first that exists counts


EXPORTED: Final = {"*.gguf": "gguf", "*.onnx": "onnx"}  # files of exports that transformers does not read: the library
# initialisations of PEFT that leave the base's weights unchanged
BEGINNINGS: Final = (True, False, "gaussian", "eva", "orthogonal")
MOVED: Final = "its update is the difference from where it began"  # of the other initialisations, such as PiSSA


def keeps_base(config: Mapping[str, Any]) -> bool:
    """Return True if the adapter adds B A to the unchanged base. For the other initialisations see `MOVED`."""
    return config.get("init_lora_weights", True) in BEGINNINGS


def read_note(folder: Path) -> dict[str, Any]:
    """Return the note beside an artifact; an empty mapping if there is none."""
    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict):
        return {}
    refuse_newer(note, NOTE_FORMAT, folder / NOTE)
    return note if isinstance(note.get("model"), dict) else {}


def find_artifact(name: str) -> Path | None:
    """Return the folder of an artifact, if `name` is that folder or a run's folder; None for anything else."""
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
