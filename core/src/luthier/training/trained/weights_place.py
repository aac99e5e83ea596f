"""Finding trained weights: a run, ended or not, one of its checkpoints, an artifact's folder, or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.recipe import Recipe
from luthier.runs.writing.record import RECIPE, read_record
from luthier.step.opened import artifact_folder


@attrs.frozen(kw_only=True)
class WeightsPlace:
    """Where weights lie: in a `checkpoint` of a `run`, or in `artifact`, a folder or a hub name.

    `record` is the run's; nothing without one.
    """

    artifact: str
    run: Path | None = None
    checkpoint: Path | None = None
    record: dict[str, Any] = attrs.field(factory=dict, repr=False)

    @property
    def step(self) -> int | None:
        """Return the step after which a checkpoint was taken."""
        return None if self.checkpoint is None else checkpoint.step_of(self.checkpoint)

    def beside(self, name: str) -> Path:
        """Return where something made of these weights is written: in the run's folder, or in the artifact's."""
        if self.run is None or self.checkpoint is None:
            return Path(self.artifact).resolve() / name if self.run is None else self.run.resolve() / name
        return self.run.resolve() / f"{name}-{self.checkpoint.name}"


def find_weights(path: str | Path, *, step: int | None = None, best: bool = False) -> WeightsPlace:
    """Return what a path names: a run's artifact; the newest checkpoint of one that is not done, or the one asked for.

    `step` and `best` choose a checkpoint of a run. Raises `artifact-not-found` where there is none such.
    """
    folder = Path(path)
    if step is not None and best:
        raise LuthierError("recipe-conflict", "one checkpoint is asked for twice", where="--best", remedy="Give one.")
    if (folder / checkpoint.MANIFEST).is_file():
        run = folder.absolute().parents[1]
        return _checked(path, step, best, WeightsPlace(artifact=str(path), run=run, checkpoint=folder,
                                                       record=read_record(run) or {}))  # fmt: skip
    record = read_record(folder)
    if record is None:
        return _checked(path, step, best, WeightsPlace(artifact=str(path)))
    place = WeightsPlace(artifact=str(path), run=folder, record=record)
    if step is not None:
        return attrs.evolve(place, checkpoint=_of_step(folder, step))
    if best:
        return attrs.evolve(place, checkpoint=_best(place, folder))
    if record.get("state") == "completed":
        return attrs.evolve(place, artifact=str(artifact_folder(folder)))
    return attrs.evolve(place, checkpoint=_newest(folder))


def _checked(path: str | Path, step: int | None, best: bool, place: WeightsPlace) -> WeightsPlace:
    if step is None and not best:
        return place
    raise LuthierError("run-not-found", "only a run has checkpoints to choose from", where=str(path),
                       remedy="Give the run's folder.")  # fmt: skip


def _of_step(run: Path, step: int) -> Path:
    folder = checkpoint.folder_of(run, step)
    if (folder / checkpoint.MANIFEST).is_file():
        return folder
    raise _absent(run, f"there is no checkpoint of step {step}")


def _newest(run: Path) -> Path:
    folders = checkpoint.list_checkpoints(run)
    if folders:
        return folders[-1]
    remedy = "Wait for its first checkpoint, or finish it with the command that began it."
    raise LuthierError("artifact-not-found", "the run has no artifact and no checkpoint yet", where=str(run),
                       remedy=remedy)  # fmt: skip


def _best(place: WeightsPlace, run: Path) -> Path:
    """Return the checkpoint of the best evaluation, by the run's record or, of one that is not done, by its newest."""
    recorded = place.record.get("result", {}).get("best_checkpoint")
    if recorded is not None:
        return _of_step(run, checkpoint.step_of(Path(recorded)))
    if place.record.get("state") == "completed":
        raise _absent(run, "no evaluation's checkpoint was kept as the best")
    newest = checkpoint.newest_checkpoint(run)
    step = None if newest is None else newest[1]["tally"]["best_step"]
    if step is None:
        raise _absent(run, "no evaluation has been the best yet")
    return _of_step(run, step)


def _absent(run: Path, problem: str) -> LuthierError:
    known = [str(checkpoint.step_of(folder)) for folder in checkpoint.list_checkpoints(run)]
    remedy = f"There are those of steps {', '.join(known)}." if known else "None was kept: see save_steps."
    return LuthierError("artifact-not-found", problem, where=str(run), remedy=remedy)


def run_recipe(run: Path) -> Recipe:
    """Return a run's recipe without callbacks and trainer: they are for training, and may be objects in Python."""
    return Recipe.load(run / RECIPE, {"callbacks": [], "trainer": None}, environ={})
