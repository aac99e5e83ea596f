"""A run whose steps a trainer takes: its checks, folder, model, record and artifact are those of any other run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.artifacts.save import artifact_name, save_adapter, save_merged
from luthier.checkpoint import folder as checkpoint
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.logs import get_logger, run_log
from luthier.plugins.events import announce_failure
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.recipe.parts import Resolved
from luthier.runs.writing import differences as changes
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.lock import locked_folder
from luthier.runs.writing.record import RECIPE, write_record
from luthier.runs.writing.target import Place, check_unchanged, find_place
from luthier.timestamp import current_time
from luthier.training.finished import tell_finished
from luthier.training.run import Run
from luthier.training.signals import handle_signals
from luthier.training.trainers.trainer_opening import open_session
from luthier.training.trainers.trainer_refusals import check_trainer
from luthier.training.trainers.trainer_resume import find_held, keeps_state, no_resume
from luthier.training.trainers.trainer_session import TrainerSession

log = get_logger()


def train_elsewhere(recipe: Recipe, objects: Objects, *, resume: Path | None = None, fresh: bool = False) -> Run:
    """Let the recipe's trainer train to the end, and return the run; see `luthier.train`."""
    resolved = check_trainer(recipe)
    _check_call(resolved, objects, resume)
    place = find_place(recipe, objects, fresh=fresh)
    if place.done:
        return tell_finished(place.folder, None, place.record)
    assert resolved.trainer is not None, "the recipe names a trainer"
    trainer = resolved.build(resolved.trainer)
    resume_point = find_held(place, trainer, resolved.trainer.name)
    with keep_randomness():
        session, now = open_session(recipe, objects, resolved, place, trainer, begins=resume_point is None)
        record = _record(recipe, now, place)
        if resume_point is not None:
            resume_point.check(recipe, record)
            resume_point.restore(session)
        with locked_folder(place.folder):
            check_unchanged(place)
            with run_log(session.run.run_id, place.folder / "log.jsonl"):
                return _run(session, record, resolved)


def _check_call(resolved: Resolved, objects: Objects, resume: Path | None) -> None:
    """Raise `part-unsupported` for what only Luthier's own loop can do."""
    name = resolved.trainer.name if resolved.trainer else ""
    if resume is not None:
        raise no_resume(name, "resume")
    if World.current().size > 1:
        problem = f"trainer {name!r} trains in one process: each of several would write this run's folder and files"
        raise LuthierError("part-unsupported", problem, where="trainer", found=f"{World.current().size} processes",
                           remedy="Start one process.")  # fmt: skip
    for what in ("model", "tokenizer", "task"):
        if getattr(objects, what) is not None:
            raise LuthierError("part-unsupported", f"trainer {name!r} cannot be handed a loaded one", where=what,
                               remedy=f"Give the name or the folder of the {what}.")  # fmt: skip


def _record(recipe: Recipe, now: dict[str, Any], place: Place) -> dict[str, Any]:
    """Return the run's record: a new one, or that of the run that goes on, if what it began with is the same."""
    if place.record is None:
        return {"created": current_time(), "seed": recipe.seed, **now}
    return changes.continue_record(place.record, now, frozenset(), place.folder, recipe_changed=False)


def _run(session: TrainerSession, record: dict[str, Any], resolved: Resolved) -> Run:
    run, began, trainer = session.run, time.monotonic(), session.parts.trainer
    checkpoint.tidy_checkpoints(run.folder)
    session.recipe.write(run.folder / RECIPE)
    run.belongs.update(changes.list_belongings(session.recipe, record))
    record.pop("error", None)  # of an attempt that this one goes on from
    evaluation = record.pop("evaluation", None)  # which came after the last step's checkpoint
    session.evaluation = (session.ended and evaluation) or session.evaluation
    write_record(run.folder, record, state="running", total_steps=run.total_steps)
    if session.resumed is not None:
        checkpoint.set_aside(run.folder, run.step)
    with _recorded(session, record), session.parts.saver:
        with handle_signals(run.control):
            if session.ended:  # all but the artifact was done
                session.begin(run.total_steps or run.step)
            else:
                trainer.train(session)
        if not session.losses and run.signal is None:
            where = f"trainer {resolved.trainer.name if resolved.trainer else ''}"
            remedy = "Give it rows and settings for one step at least."
            raise LuthierError("part-invalid", "it came to an end without a step", where=where, found=run.stop_reason,
                               remedy=remedy)  # fmt: skip
        if run.signal is not None:
            raise _interrupted(session, run.signal)
        return _finished(session, record, time.monotonic() - began)


def _interrupted(session: TrainerSession, signal: int) -> Exception:
    """Return what ends a run that a signal has stopped."""
    run = session.run
    session.parts.hooks.stopped(run=run, step=run.step, reason=f"signal {signal}")
    if keeps_state(session.parts.trainer):
        return Interrupted(signal, run.step, run.folder)
    return LuthierError("interrupted", f"stopped by a signal after step {run.step}", where=str(run.folder),
                        remedy=f"luthier generate {run.folder} answers with its newest checkpoint.")  # fmt: skip


def _finished(session: TrainerSession, record: dict[str, Any], seconds: float) -> Run:
    """Write the artifact, and return what the run has given."""
    run, parts, recipe = session.run, session.parts, session.recipe
    parts.adapter.end_task(0, 1)
    parts.hooks.task_ended(run=run, task=0)
    if run.stop_reason is not None and run.step != run.total_steps:
        parts.hooks.stopped(run=run, step=run.step, reason=run.stop_reason)
    progress = {"step": run.step, "total_steps": run.total_steps, "epoch": 0.0}
    note, model = {**record["note"], "progress": progress}, session.model.eval()
    with parts.optimizer.evaluating():
        place = run.folder / artifact_name(parts.adapter)
        artifact = save_adapter(model, session.tokenizer, parts.adapter, place, note, parts.quantizer)
        merged = None
        if recipe.merge:
            merged = save_merged(model, session.tokenizer, parts.adapter, parts.quantizer, run.folder / "merged", note)
    result = Run(
        run_id=run.run_id, output_path=run.folder, artifact=artifact, merged=merged, best_checkpoint=None,
        steps=run.step, samples_seen=session.samples, tokens_seen=session.tokens, final_loss=session.losses[-1],
        loss_history=session.losses, duration_seconds=seconds, eval_loss=session.evaluation.get("eval_loss"),
        eval_metrics=session.evaluation, stop_reason=run.stop_reason, parts=record["parts"],
    )  # fmt: skip
    write_record(run.folder, record, state="completed", step=run.step, total_steps=run.total_steps,
                 result=result.to_dict())  # fmt: skip
    parts.hooks.completed(run=run, result=result)
    return result


@contextlib.contextmanager
def _recorded(session: TrainerSession, record: dict[str, Any]) -> Iterator[None]:
    """Record in run.json how the run ends."""
    run = session.run
    try:
        yield
    except BaseException as error:
        is_stopped = isinstance(error, KeyboardInterrupt) or run.signal is not None
        state = "stopped" if is_stopped else "failed"
        with contextlib.suppress(OSError):
            write_record(run.folder, record, state=state, step=run.step, error=str(error),
                         evaluation=session.evaluation)  # fmt: skip
        if not is_stopped:
            announce_failure(session.parts.hooks, run, error)
        raise
