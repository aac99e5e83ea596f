"""Folders written as a whole: beside their final path, then renamed, so that a folder is never half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from luthier.artifacts.model_card import put_card
from luthier.disk import settle_folder, write_json
from luthier.errors import LuthierError, unwritable_path
from luthier.recipe.artifact_note import NOTE

INNER: Final = ("additional_chat_templates",)  # the only folder inside an artifact: a tokenizer's further templates


def write_artifact(folder: Path, write: Callable[[Path], object], note: dict[str, Any] | None = None) -> Path:
    """Return `folder`, filled by `write`; it replaces an artifact that was there (see `check_replaceable`).

    With a `note` a model card is added, unless the user wrote one.
    """
    check_replaceable(folder)
    place = folder.resolve()
    aside = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise unwritable_path(folder, error) from None
    try:
        write(aside)
        if note is not None:
            write_json(aside / NOTE, note)
            put_card(aside, place, note)
        settle_folder(aside)
        old = place.with_name(f".{place.name}.{os.getpid()}.old")
        if place.exists():
            os.replace(place, old)
        os.replace(aside, place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def check_replaceable(folder: Path) -> None:
    """Raise unless a folder is new, empty, or one artifact with Luthier's note and nothing else in it.

    Raises `path-unwritable` for a file and for a folder that contains the working directory, else `run-folder-other`.
    """
    try:
        place = folder.resolve()
        inside = sorted(place.iterdir()) if place.exists() else []
        around = Path.cwd().is_relative_to(place)
    except OSError as error:
        raise unwritable_path(folder, error) from None
    if around:
        problem, remedy = "the command runs in this folder, so it cannot be replaced", "Name a new folder."
        raise LuthierError("path-unwritable", problem, where="output_dir", found=str(folder), remedy=remedy)
    if inside and not (place / NOTE).is_file():
        problem, remedy = f"the folder holds something else: there is no {NOTE} in it", "Choose another folder."
        raise LuthierError("run-folder-other", problem, where=str(folder), remedy=remedy)
    for further in inside:  # for example a merged model beside the adapter's files
        if further.is_dir() and further.name not in INNER:
            thing = "model" if is_artifact(further) else "folder"
            problem, remedy = f"this {thing} is in the folder that would be replaced", "Move it, or choose another."
            raise LuthierError("run-folder-other", problem, where=str(further), remedy=remedy)


def same_base(note: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True unless two notes name different base models, by their fingerprints or else by name."""
    prints = note.get("base"), other.get("base")
    if None not in prints:
        return prints[0] == prints[1]
    return note.get("model") == other.get("model")


def is_artifact(folder: Path) -> bool:
    """Return True if a folder holds an adapter's files or a model's."""
    names = {NOTE, "config.json", "adapter_config.json"}
    return any((folder / name).is_file() for name in names)
