"""The state of an adapter between tasks: what one task leaves, and the next begins from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.checkpoint.shards import as_held
from luthier.disk import settle_folder
from luthier.distributed.broadcast import broadcast_tree
from luthier.errors import LuthierError
from luthier.recipe.objects import TaskPlace
from luthier.state_tree import load_state, save_state

if TYPE_CHECKING:
    from luthier.step.setup import Setup

STATE: Final = "task-state"  # the folder in a task's run


def write_task_state(folder: Path, adapter_state: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Write what the next task begins from; complete or absent."""
    target = folder / STATE
    aside = folder / f".{STATE}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_state({"adapter": adapter_state, "constants": dict(constants)}, aside)
    settle_folder(aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def take_task_state(setup: Setup, place: TaskPlace) -> None:
    """Put what the task before has left into the adapter. It is collective.

    Raises `checkpoint-corrupt` where it is not there, or of another adapter.
    """
    if place.carried is None:
        return
    tree = broadcast_tree(setup.world, lambda: _read_state(place.carried))
    setup.adapter.load_constants(tree["constants"])
    task_tree = as_held(setup, {"adapter": tree["adapter"], "optimizer": {"state": {}}}, place.carried)
    setup.adapter.load_state(task_tree["adapter"])


def _read_state(folder: Path | None) -> dict[str, Any]:
    try:
        return load_state(Path(str(folder)))
    except (OSError, ValueError, KeyError) as error:
        remedy = "Run the same command again: it trains the task before first."
        raise LuthierError("checkpoint-corrupt", f"unreadable: {error}", where=str(folder), remedy=remedy) from error
