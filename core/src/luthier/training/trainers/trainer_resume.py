"""Resume of a run whose steps a trainer takes: its newest checkpoint, where the trainer keeps a state in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from luthier.checkpoint import folder as checkpoint
from luthier.checkpoint.run_state import restore_state
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.plugins.completion import has_default
from luthier.recipe import Recipe
from luthier.runs.writing import differences as changes
from luthier.runs.writing.target import Place
from luthier.state_tree import copy_state
from luthier.training.trainers.trainer_session import TrainerSession

log = get_logger()


@attrs.frozen(kw_only=True, eq=False)
class Held:
    """A checkpoint that a run goes on from."""

    path: Path
    tree: dict[str, Any] = attrs.field(repr=False)

    def check(self, recipe: Recipe, record: Mapping[str, Any]) -> None:
        """Raise where the checkpoint is of another run than the folder's."""
        diffs = changes.find_changes(checkpoint.require_checkpoint(self.path), changes.list_belongings(recipe, record))
        changes.refuse_changes(diffs, frozenset(), str(self.path))

    def restore(self, session: TrainerSession) -> None:
        """Put everything back as the checkpoint has it."""
        parts, tally = session.parts, dict(self.tree["tally"])
        session.begun = copy_state(parts.adapter.state())
        restore_state(parts.adapter, session.optimizer, {"quantizer": parts.quantizer}, parts.callbacks, self.tree)
        session.resumed = self.tree["trainer"]
        session.losses, session.evaluation = tally["losses"].tolist(), dict(tally["evaluation"])
        session.penalties = [float(penalty) for penalty in tally.get("penalties", ())]
        session.tokens, session.samples = tally["tokens"], tally["samples"]
        session.ended = tally["ended"]
        session.run.step, session.run.total_steps = tally["step"], tally["total_steps"]
        session.run.control.stop_reason = tally["stop_reason"]
        log.warning("resumed", step=session.run.step, checkpoint=str(self.path))


def find_held(place: Place, trainer: Any, name: str) -> Held | None:
    """Return the newest whole checkpoint of the run in a folder; None where it begins.

    Raises `part-unsupported` where the run has begun and its trainer keeps no state.
    """
    if place.record is None:
        return None
    if not keeps_state(trainer):
        raise no_resume(name, str(place.folder))
    newest = checkpoint.newest_checkpoint(place.folder)
    if newest is None:
        return None
    path, tree, damaged = newest
    for error in damaged:
        log.warning("checkpoint damaged, using the one before", error=str(error))
    if tree.get("trainer") is None:
        raise no_resume(name, str(path))
    return Held(path=path, tree=tree)


def keeps_state(trainer: Any) -> bool:
    """Return True if a trainer can go on with a run that was cut off."""
    return not has_default(trainer, "trainer", "state")


def no_resume(name: str, where: str) -> LuthierError:
    """Return the error of a run that cannot go on."""
    remedy = "Start anew with --fresh; adapter_from begins with the weights of an adapter."
    return LuthierError("part-unsupported", f"trainer {name!r} cannot go on with a run that was cut off", where=where,
                        remedy=remedy)  # fmt: skip
