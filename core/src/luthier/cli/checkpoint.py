"""`luthier checkpoint`: ask a running run for a checkpoint, and wait until it is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from luthier.cli.completion.commands import complete_run
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json
from luthier.errors import LuthierError

PAUSE: Final = 0.05  # seconds between two looks


def checkpoint(
    run: Annotated[
        str, typer.Argument(help="A run that trains now: its id, its name, or its folder.", autocompletion=complete_run)
    ],
    *,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end of its step.", min=0.0)] = 600.0,
    json: Json = False,
) -> Any:
    """Have a running run save a checkpoint after its step."""
    from luthier.cli.runs import USUAL
    from luthier.runs.find import find_run

    folder = find_run(run, USUAL)
    if folder.damage is not None:
        raise LuthierError("run-not-found", folder.damage, where=str(folder.path))
    path = asked(folder.path, timeout)
    document = {"run": folder.path, "step": int(path.name.removeprefix("step-")), "checkpoint": path}
    return Answer(document=document, view=lambda screen: screen.out(f"checkpoint: {path}", highlight=False))


def asked(folder: Path, timeout: float) -> Path:
    """Return the checkpoint that the run in `folder` writes on request.

    Raises `run-not-running`, or `run-silent` after `timeout` seconds.
    """
    from luthier.checkpoint import folder as checkpoint
    from luthier.runs.run_folder import is_held
    from luthier.runs.writing import save_requests as requests

    if not is_held(folder):
        raise _not_running(folder)
    requests.ask_save(folder)
    until = time.monotonic() + timeout
    while requests.save_pending(folder):
        lives = is_held(folder)
        if not lives or time.monotonic() > until:
            requests.withdraw_request(folder)
            raise _silent(folder, timeout) if lives else _not_running(folder)
        time.sleep(PAUSE)
    return checkpoint.list_checkpoints(folder)[-1]


def _not_running(folder: Path) -> LuthierError:
    from luthier.runs.run_folder import read_folder

    state = read_folder(folder).state
    remedy = f"It is done: its checkpoints are in {folder / 'checkpoints'}." if state == "completed" else None
    problem = f"the run is {state}, and no process trains it"
    return LuthierError("run-not-running", problem, where=str(folder), remedy=remedy)


def _silent(folder: Path, timeout: float) -> LuthierError:
    return LuthierError("run-silent", f"no checkpoint within {timeout:g} seconds", where=str(folder))
