"""The state of an adapter between tasks: what one task leaves, and the next begins from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.disk import settle_folder
from luthier.distributed.broadcast import broadcast_tree
from luthier.errors import LuthierError
from luthier.state_tree import load_state, save_state

if TYPE_CHECKING:
    from luthier.distributed.world import World
    from luthier.plugins.contracts.protocols import Adapter

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


def take_task_state(
    adapter: Adapter, folder: Path, world: World, hold: Callable[[dict[str, Any], Path], dict[str, Any]]
) -> None:
    """Put what the task before has left in `folder` into the adapter. This is a collective.

    `hold(tree, folder)` gives a tree as this world holds it. Raises `checkpoint-corrupt` where the state is missing, or
    that of another adapter.
    """
    tree = broadcast_tree(world, lambda: _read_state(folder))
    adapter.load_constants(tree["constants"])
    adapter.load_state(hold({"adapter": tree["adapter"], "optimizer": {"state": {}}}, folder)["adapter"])


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return load_state(folder)
    except (OSError, ValueError, KeyError) as error:
        remedy = "Run the same command again: it trains the task before first."
        raise LuthierError("checkpoint-corrupt", f"unreadable: {error}", where=str(folder), remedy=remedy) from error
