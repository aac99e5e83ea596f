"""The state of an adapter between tasks: what one task leaves, and the next begins from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.disk import settle_folder, write_json
from luthier.distributed.broadcast import broadcast_tree
from luthier.errors import LuthierError
from luthier.model.weights.shard_tensors import whole_tensor
from luthier.state_tree import load_state, save_state

if TYPE_CHECKING:
    from luthier.distributed.world import World
    from luthier.plugins.contracts.protocols import Adapter

STATE: Final = "task-state"  # the folder in a task's run
DECISIONS: Final = "decisions.json"  # in that folder


def leave_task_state(
    folder: Path, adapter: Adapter, states: Mapping[str, Any] | None, decisions: Mapping[str, Any], world: World
) -> None:
    """Write what the next task begins from; complete or absent. This is a collective.

    `states` are those that `gather_states` returned for a sharded model; None: the adapter's own state is whole.
    `decisions` are what adapter and quantizer have decided, which holds for all tasks.
    """
    constants: dict[str, Any] = {}
    for name, tensor in adapter.constants().items():
        whole = whole_tensor(tensor)  # of every rank, even if it keeps nothing
        if world.is_main:
            constants[name] = whole
    if world.is_main:
        own = adapter.state() if states is None else states["adapter"]
        _write_state(folder, {"adapter": own, "constants": constants}, decisions)


def _write_state(folder: Path, tree: Mapping[str, Any], decisions: Mapping[str, Any]) -> None:
    target = folder / STATE
    aside = folder / f".{STATE}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_state(tree, aside)
    write_json(aside / DECISIONS, dict(decisions))
    settle_folder(aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)


def read_task_decisions(folder: Path | None) -> dict[str, Any]:
    """Return what adapter and quantizer decided in the task whose state is in `folder`; None: there was none."""
    path = None if folder is None else folder / DECISIONS
    if path is None or not path.is_file():
        return {}
    decisions: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return decisions


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
