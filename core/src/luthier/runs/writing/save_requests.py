"""Requests for a checkpoint: a file in the run's folder, which is removed once the checkpoint is written.

Without torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

ASKED: Final = "save-now"
TAKEN: Final = ".save-now.taken"  # the training loop has seen the request, and its checkpoint is on the way


def ask_save(folder: Path) -> None:
    """Ask the run in `folder` for a checkpoint after the step that is under way."""
    (folder / ASKED).touch()


def take_request(folder: Path) -> bool:
    """Return True if a checkpoint has been asked for since the last call, and mark the request as seen."""
    if not (folder / ASKED).exists():
        return False
    with suppress(FileNotFoundError):  # the request was withdrawn meanwhile
        os.replace(folder / ASKED, folder / TAKEN)
    return True


def request_taken(folder: Path) -> bool:
    """Return True if a request has been seen and not yet answered."""
    return (folder / TAKEN).exists()


def answer_request(folder: Path) -> None:
    """Remove the request, because its checkpoint is complete."""
    (folder / TAKEN).unlink(missing_ok=True)


def save_pending(folder: Path) -> bool:
    return (folder / ASKED).exists() or request_taken(folder)


def withdraw_request(folder: Path) -> None:
    """Withdraw the request for a checkpoint."""
    (folder / ASKED).unlink(missing_ok=True)
