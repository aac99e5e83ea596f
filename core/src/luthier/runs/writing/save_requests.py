"""Requests: a file in the run's folder asks for a checkpoint, and is gone once one has been written. No torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

ASKED: Final = "save-now"
TAKEN: Final = ".save-now.taken"  # seen by the loop, whose checkpoint is on its way


def ask_save(folder: Path) -> None:
    """Ask the run in `folder` for a checkpoint after the step that it is in."""
    (folder / ASKED).touch()


def take_request(folder: Path) -> bool:
    """Whether a checkpoint has been asked for since the last time; the request is then marked as seen."""
    if not (folder / ASKED).exists():
        return False
    with suppress(FileNotFoundError):  # whoever asked has thought better of it
        os.replace(folder / ASKED, folder / TAKEN)
    return True


def request_taken(folder: Path) -> bool:
    """Whether a request has been seen and not answered."""
    return (folder / TAKEN).exists()


def answer_request(folder: Path) -> None:
    """The checkpoint that was asked for is complete."""
    (folder / TAKEN).unlink(missing_ok=True)


def save_pending(folder: Path) -> bool:
    return (folder / ASKED).exists() or request_taken(folder)


def withdraw_request(folder: Path) -> None:
    """Ask no longer."""
    (folder / ASKED).unlink(missing_ok=True)
