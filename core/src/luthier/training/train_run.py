"""A run from its recipe to its artifact: folder, lock, resume, loop, record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from luthier.artifacts.note import Prompting, make_note
from luthier.artifacts.save import artifact_name, save_adapter, save_merged
from luthier.checkpoint import folder as checkpoint
from luthier.checkpoint.shards import gather_states
from luthier.checkpoint.task_state import leave_task_state, read_task_decisions
from luthier.data.formats.wanted import Wanted
from luthier.disk import Reserve, is_full
from luthier.distributed.broadcast import broadcast_tree
from luthier.distributed.join import describe_launch, join_world
from luthier.distributed.orphans import guard_orphan
from luthier.distributed.world import World, explain_error, lost_peers
from luthier.errors import LuthierError
from luthier.hardware import devices
from luthier.logs import get_logger, run_log
from luthier.model.load import tokenizer_of
from luthier.model.weights import fingerprint
from luthier.model.weights.dense_files import Files
from luthier.plugins.events import announce_failure
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe, recipe_hash, resolve_parts
from luthier.recipe.objects import Objects
from luthier.runs.writing import differences as changes
from luthier.runs.writing.active_run import ActiveRun, Interrupted
from luthier.runs.writing.decisions import Decisions
from luthier.runs.writing.lock import locked_folder
from luthier.runs.writing.record import RECIPE, new_id, read_record, record_environment, strict_json, write_record
from luthier.runs.writing.target import Place, check_unchanged, find_place
from luthier.step.preparation import keep_decisions
from luthier.step.setup import Setup
from luthier.timestamp import current_time
from luthier.training.assemble import Assembled, assemble_run, whole_again
from luthier.training.best_metric import check_metrics
from luthier.training.finished import tell_finished
from luthier.training.handed_model import left_as_given
from luthier.training.loop import Loop
from luthier.training.rows import prepared_data
from luthier.training.run import Run
from luthier.training.signals import handle_signals

log = get_logger()


def train(
    recipe: Recipe, objects: Objects, *, resume: Path | None = None, fresh: bool = False, re_decide: bool = False,
    allowed: frozenset[str] = frozenset(),
) -> Run:  # fmt: skip
    """Train to the end, or go on with what the folder holds; see `luthier.train`."""
    world = join_world(recipe.distributed, recipe.device)
    if resume is not None:
        world.decide(lambda: checkpoint.require_checkpoint(resume))
    place = Place.of(world.decide(lambda: find_place(recipe, objects, fresh=fresh, allowed=allowed).to_dict()))
    if place.done:
        return _done(place, recipe, objects, allowed)
    # everything that can be refused is refused before a folder appears
    with keep_randomness(), left_as_given(objects.model):
        past = world.decide(lambda: _past_decisions(place, objects, resume, anew=re_decide))
        begins = world.decide(lambda: _begins(place, resume))
        assembled = assemble_run(recipe, objects, Decisions(past, world.decide), world, begins=begins, saves=begins)
        try:
            check_metrics(assembled.setup, assembled.callbacks)
            record = world.decide(lambda: _record(recipe, assembled, place, allowed, resume))
            with _owned(place, record, world):
                return _run(recipe, assembled, place, record, resume)
        finally:  # the model belongs to the caller again
            assembled.setup.undo.close()
            assembled.setup.model.set_attn_implementation(assembled.setup.attention)


def _past_decisions(place: Place, objects: Objects, resume: Path | None, *, anew: bool) -> dict[str, Any]:
    """Return what all tasks of a sequence share, and what the run that goes on decided when it began, unless `anew`."""
    shared = read_task_decisions(None if objects.task is None else objects.task.carried)
    if anew:
        return shared
    record = place.record if resume is None else read_record(resume.absolute().parents[1])  # the checkpoint's run
    return {**shared, **((record or place.record or {}).get("decisions") or {})}


def _begins(place: Place, resume: Path | None) -> bool:
    """Return whether the run starts afresh: there is no checkpoint that it could go on from."""
    goes_on = resume is not None or checkpoint.known_checkpoints(place.folder)
    return not goes_on and "resumed_from" not in (place.record or {})


def _done(place: Place, recipe: Recipe, objects: Objects, allowed: frozenset[str]) -> Run:
    """Return the finished run. Raises if rows differ of which the recipe does not tell: from Python, or of a task."""
    if objects.data is not None or objects.task is not None:
        tokenizer = objects.tokenizer or tokenizer_of(recipe.model)
        wanted = Wanted.of_part(resolve_parts(recipe).loss)
        now = {"data": prepared_data(recipe, objects, tokenizer, wanted).train.fingerprint}
        changes.refuse_changes(changes.find_changes(place.record or {}, now), allowed, str(place.folder))
    return tell_finished(place.folder, (recipe, objects), place.record)


@contextlib.contextmanager
def _owned(place: Place, record: dict[str, Any], world: World) -> Iterator[None]:
    """Lock the folder within this context on rank 0, which alone writes there."""
    if not world.is_main:
        yield
        return
    with locked_folder(place.folder):
        check_unchanged(place)
        with run_log(record["run_id"], place.folder / "log.jsonl"):
            yield


def _record(
    recipe: Recipe, assembled: Assembled, place: Place, allowed: frozenset[str], resume: Path | None
) -> dict[str, Any]:
    """Return the run's record: a new one, or that of the run that goes on, if what it began with is the same."""
    run_id, parts = (place.record or {}).get("run_id") or new_id(), [p.describe() for p in assembled.resolved]
    wish = getattr(assembled.setup.adapter, "save_dtype", None)
    files = Files.of_recipe(recipe, assembled.setup.context.dtype, wish)
    if wish and not files.asked:
        log.info("dtype of the files", dtype=wish, because="the adapter's record asks for it")
    now = {
        "run_id": run_id,
        "recipe_hash": recipe_hash(recipe),
        "data": assembled.prepared.train.fingerprint,
        "base": fingerprint.of_model(recipe.model.name_or_path),
        "parts": parts,
        "note": make_note(recipe.to_dict(), run_id, parts, Prompting.of_rows(assembled.prepared), files),
        **record_environment(str(assembled.setup.device)),
    }
    began = {"created": current_time(), "seed": recipe.seed}
    old, changed, resume = place.record, place.changed, resume or checkpoint.find_orphan(place)
    record = {**began, **now} if old is None else changes.continue_record(old, now, allowed, place.folder, changed)
    if resume is not None:
        diffs = changes.find_changes(checkpoint.require_checkpoint(resume), changes.list_belongings(recipe, record))
        changes.refuse_changes(diffs, allowed, str(resume))
        record = changes.note_changes(record, diffs)
    return {**record, **describe_launch(assembled.setup.world)}


def _run(recipe: Recipe, assembled: Assembled, place: Place, record: dict[str, Any], resume: Path | None) -> Run:
    folder, setup = place.folder, assembled.setup
    run = ActiveRun(
        run_id=record["run_id"],
        folder=folder,
        name=recipe.run_name or folder.name,
        settings=recipe.to_dict(),
        total_steps=setup.feed.total,
        belongs=changes.list_belongings(recipe, record),
        phases=setup.phases,
        is_main=setup.world.is_main,
    )
    loop = Loop(setup, run, assembled.callbacks, assembled.case.objects.task)
    with contextlib.ExitStack() as heard, _recorded(loop, record) if run.is_main else lost_peers():
        if run.is_main:
            _begin(recipe, loop, place, record)
        _warn(assembled)
        # signals count until a failure is recorded, as the launcher ends all processes then
        heard.enter_context(handle_signals(run.control))
        heard.enter_context(guard_orphan())
        _start(loop, record, resume)
        loop.train()
        heard.close()
        return _finish(loop, record, assembled)


def _begin(recipe: Recipe, loop: Loop, place: Place, record: dict[str, Any]) -> None:
    """Say in the folder that a run is under way."""
    checkpoint.tidy_checkpoints(place.folder)
    if place.record is None or place.changed:
        recipe.write(place.folder / RECIPE)
    decided = loop.setup.decisions.to_dict()
    record.pop("error", None)  # left by an attempt that this one continues
    write_record(place.folder, record, state="running", total_steps=loop.run.total_steps, decisions=decided)


def _warn(assembled: Assembled) -> None:
    """Log what the preparation of the rows had to say, such as the share that was dropped, once for both sets."""
    report = assembled.prepared.report
    held_out = report.validation.warnings if report.validation else ()
    for warning in dict.fromkeys((*report.warnings, *held_out)):
        log.warning("data", warning=warning)


def _start(loop: Loop, record: dict[str, Any], resume: Path | None) -> None:
    """From a checkpoint, if there is one, else from the beginning; from another run's only until it has its own."""
    run, began = loop.run, record.get("resumed_from")
    asked = began if resume is None else str(resume.absolute())
    resumed = broadcast_tree(loop.setup.world, lambda: _newest(run, asked, own=asked == began))
    if resumed is None:
        log.info("run started", folder=str(run.folder), steps=run.total_steps)
        loop.hooks.run_started(run=run)
        return
    path, tree, fresh = resumed
    loop.resume(loop.hold(tree, Path(path)), Path(path).absolute().parents[1], frozenset(fresh))
    if run.is_main:
        for left in checkpoint.set_aside(run.folder, run.step):
            log.warning("checkpoint set aside, as the run goes on before it", checkpoint=str(left))
        also = {} if asked == began else {"resumed_from": asked}
        write_record(run.folder, record, total_steps=run.total_steps, **also)
    log.warning("resumed", step=run.step, checkpoint=path)


def _newest(run: ActiveRun, asked: str | None, *, own: bool) -> tuple[str, dict[str, Any], list[str]] | None:
    """Return the run's newest checkpoint, or the one asked for: its path, its tree, and what restarts."""
    newest = checkpoint.newest_checkpoint(run.folder) if own else None
    if newest is None and asked is None:
        return None
    path, tree, damaged = newest or (Path(str(asked)), checkpoint.load_checkpoint(Path(str(asked))), [])
    for error in damaged:
        log.warning("checkpoint damaged, using the one before", error=str(error))
    return str(path), tree, sorted(changes.begun_anew(checkpoint.require_checkpoint(path), run.belongs))


def _finish(loop: Loop, record: dict[str, Any], assembled: Assembled) -> Run:
    """Write the artifact and return the result."""
    setup, run, tally = loop.setup, loop.run, loop.tally
    setup.undo.close()  # artifacts are made of the weights in their original form
    part = setup.optimizer_part
    state = None if not setup.is_sharded else gather_states(setup.adapter, setup.quantizer, part, keep=run.is_main)
    also = {"progress": attrs.asdict(setup.progress), "decisions": keep_decisions(setup.decisions)}
    results = strict_json({"loss": tally.losses[-1], **tally.evaluation})
    record["note"] = record["note"] | also | {"card": {**record["note"].get("card", {}), "results": results}}
    if loop.task.total > 1:
        with setup.optimizer_part.evaluating():
            leave_task_state(run.folder, setup.adapter, state, also["decisions"], setup.world)
    artifact, merged, best = setup.world.decide(lambda: _written(loop, record["note"], assembled, state))
    setup.shown.enter_context(setup.optimizer_part.evaluating())  # the run's model then has the weights of its artifact
    result = Run(
        run_id=run.run_id, output_path=run.folder, artifact=Path(str(artifact)),
        merged=None if merged is None else Path(merged), best_checkpoint=None if best is None else Path(best),
        steps=tally.step, samples_seen=tally.samples, tokens_seen=tally.tokens,
        final_loss=tally.losses[-1], loss_history=tally.losses, duration_seconds=tally.seconds,
        eval_loss=tally.evaluation.get("eval_loss"), eval_metrics=tally.evaluation,
        stop_reason=run.stop_reason, parts=record["parts"], setup=setup if state is None else None,
        given=None if state is None else (assembled.case.recipe, assembled.case.objects),
    )  # fmt: skip
    if not run.is_main:
        return result
    decisions, health = setup.decisions.to_dict(), loop.health.report()  # both grow during the run
    write_record(run.folder, record, state="completed", step=tally.step, result=result.to_dict(), decisions=decisions,
                 health=health, sources=assembled.prepared.report.sources)  # fmt: skip
    loop.hooks.completed(run=run, result=result)
    return result


def _written(loop: Loop, note_: dict[str, Any], assembled: Assembled, state: dict[str, Any] | None) -> list[str | None]:
    """Return where the artifact, the merged model and the best checkpoint lie; `state` is that of a sharded model."""
    setup = loop.setup
    if state is not None:
        setup = whole_again(assembled)
        setup.adapter.load_state(state["adapter"])
        setup.quantizer.load_state(state["quantizer"])
        setup.undo.close()
    paths = (*_artifacts(setup, loop.run.folder, note_), loop.best_checkpoint())
    return [None if path is None else str(path) for path in paths]


def _artifacts(setup: Setup, folder: Path, note_: dict[str, Any]) -> tuple[Path, Path | None]:
    """Write the adapter's own files, and the merged model if the recipe asks for it; return their paths."""
    model, tokenizer, adapter = setup.model, setup.tokenizer, setup.adapter
    setup.tell_progress()
    with setup.optimizer_part.evaluating():
        artifact = save_adapter(model, tokenizer, adapter, folder / artifact_name(adapter), note_, setup.quantizer)
        if not setup.recipe.merge:
            return artifact, None
        return artifact, save_merged(model, tokenizer, adapter, setup.quantizer, folder / "merged", note_)


@contextlib.contextmanager
def _recorded(loop: Loop, record: dict[str, Any]) -> Iterator[None]:
    """Record in run.json how the run ends, however it does."""
    run = loop.run
    reserve = Reserve(run.folder)
    try:
        yield
    except Interrupted:
        reserve.release()
        write_record(run.folder, record, state="stopped", step=run.step, health=loop.health.report())
        raise
    except BaseException as error:
        reserve.release()
        error = explain_error(error)
        if devices.is_gone(error):
            newest = next(reversed(checkpoint.list_checkpoints(run.folder)), None)
            error = devices.device_lost(error, loop.setup.device, run.step, newest)
        if is_full(error):
            error = LuthierError("disk-full", f"stopped at step {run.step}", where=str(run.folder))
        with contextlib.suppress(OSError):
            ended = {"step": run.step, "error": str(error), "health": loop.health.report()}
            ended["state"] = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"  # it was a second Ctrl-C
            write_record(run.folder, record, **ended)
        announce_failure(loop.hooks, run, error)
        raise error
    finally:
        reserve.release()
