"""Folders written whole: beside their place, then renamed, so that what is there can be trusted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.artifacts.model_card import put_card
from luthier.disk import settle_folder, write_json
from luthier.errors import LuthierError, unwritable_path
from luthier.recipe.artifact_note import NOTE


def write_artifact(folder: Path, write: Callable[[Path], object], note: dict[str, Any] | None = None) -> Path:
    """`folder` as `write` fills it, replacing an artifact that stood there; refused where something else does as well.

    With a `note` a model card is beside it; one that a user wrote stays.
    """
    _check_replaceable(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise unwritable_path(folder, error) from None
    try:
        write(aside)
        if note is not None:
            write_json(aside / NOTE, note)
            put_card(aside, folder, note)
        settle_folder(aside)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _check_replaceable(folder: Path) -> None:
    """Raise `run-folder-other` where a folder holds more than one artifact, or none of ours."""
    inside = sorted(folder.iterdir()) if folder.exists() else []
    if inside and not is_artifact(folder):
        remedy = "Choose another folder."
        raise LuthierError("run-folder-other", "the folder holds something else", where=str(folder), remedy=remedy)
    for further in filter(is_artifact, inside):  # such as a merged model beside the adapter's files
        problem, remedy = "this model lies in the folder that would be replaced", "Move it, or choose another folder."
        raise LuthierError("run-folder-other", problem, where=str(further), remedy=remedy)


def same_base(note: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True unless two notes name different base models: by their fingerprints, or else by name."""
    prints = note.get("base"), other.get("base")
    if None not in prints:
        return prints[0] == prints[1]
    return note.get("model") == other.get("model")


def is_artifact(folder: Path) -> bool:
    """Return whether a folder holds an adapter's files or a model's."""
    names = {NOTE, "config.json", "adapter_config.json"}
    return any((folder / name).is_file() for name in names)
