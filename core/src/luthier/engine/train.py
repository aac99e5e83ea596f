"""A run from its recipe to its artifact: folder, lock, resume, loop, record."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from luthier.artifacts.notes import note
from luthier.artifacts.save import artifact_name, save_adapter, save_merged
from luthier.data.prepare import Prepared
from luthier.engine import checkpoint
from luthier.engine.again import finished
from luthier.engine.assemble import Assembled, Objects, assemble, prepared_data
from luthier.engine.load import tokenizer_of
from luthier.engine.loop import Loop, Tally
from luthier.engine.result import Run
from luthier.engine.run import (
    RECIPE,
    RECORD,
    ActiveRun,
    Interrupted,
    environment,
    locked,
    new_id,
    read_record,
    signals,
    write_record,
)
from luthier.engine.seeds import kept
from luthier.engine.setup import Setup
from luthier.errors import LuthierError
from luthier.logs import get_logger, run_log
from luthier.recipe import Recipe, recipe_hash, resolve

log = get_logger()


@attrs.frozen(kw_only=True)
class Place:
    """Where a run goes, and whether it goes on from a checkpoint there."""

    folder: Path
    record: dict[str, Any] | None = None
    done: bool = False


def train(recipe: Recipe, objects: Objects, *, resume: Path | None = None, fresh: bool = False) -> Run:
    """Train to the end, or go on with what the folder holds; see `luthier.train`."""
    if resume is not None:
        checkpoint.require(resume, recipe=recipe_hash(recipe))
    place = find_place(recipe, objects, fresh=fresh)
    if place.done:
        return _done(place, recipe, objects)
    with kept():
        assembled = assemble(recipe, objects)  # whatever can be refused is, before a folder appears
        record = _record(recipe, assembled, place)
        if resume is not None:
            checkpoint.require(resume, data=record["data"])
        try:
            with locked(place.folder), run_log(record["run_id"], place.folder / "log.jsonl"):
                return _run(recipe, assembled, place, record, resume)
        finally:  # the model is the caller's again
            assembled.setup.model.set_attn_implementation(assembled.setup.attention)


def _done(place: Place, recipe: Recipe, objects: Objects) -> Run:
    """The finished run; refused where rows from Python, which the recipe cannot tell apart, are others now."""
    if objects.data is not None:
        resolved = resolve(recipe)
        tokenizer, loss = objects.tokenizer or tokenizer_of(recipe.model), resolved.build(resolved.loss)
        _refuse_changed(place, prepared_data(recipe, objects, tokenizer, loss))
    log.warning("run already finished", folder=str(place.folder), remedy="--fresh trains again")
    return finished(place.folder, (recipe, objects))


def find_place(recipe: Recipe, objects: Objects, *, fresh: bool) -> Place:
    """The run's folder. Another run's is refused; with `fresh`, and for objects, a new one beside it is taken."""
    given = any(v is not None for v in attrs.astuple(objects, recurse=False))
    folder = Path(recipe.output_dir) if recipe.output_dir else default_folder(recipe)
    record = read_record(folder)
    if fresh or (given and record is not None and recipe.output_dir is None):
        return Place(folder=beside(folder))
    if record is None:
        _refuse_strangers(folder)
        return Place(folder=folder)
    if record["recipe_hash"] != recipe_hash(recipe):
        problem = f"it holds run {record['run_id']} of another recipe"
        raise LuthierError("run-folder-other", problem, where=str(folder))
    return Place(folder=folder, record=record, done=record["state"] == "completed")


def default_folder(recipe: Recipe) -> Path:
    """runs/<model>-<adapter>-<hash>: the same recipe finds its own folder again."""
    from luthier.plugins.registry import installed
    from luthier.recipe.parts import find_part

    model = Path(recipe.model.name_or_path).name or "model"
    adapter = find_part(recipe.adapter, "adapter", "adapter", installed()).name.rpartition(".")[2]
    named = re.sub(r"[^\w.-]+", "-", recipe.run_name or "").strip("-.")  # a name for people may be no file's name
    return Path("runs") / (named or f"{model}-{adapter}-{recipe_hash(recipe)[:8]}")


def beside(folder: Path) -> Path:
    """The folder, or the first free name beside it."""
    number, candidate = 2, folder
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def _refuse_strangers(folder: Path) -> None:
    """A folder that holds files of no run is not ours to fill."""
    if folder.exists() and not folder.is_dir():
        raise LuthierError("run-folder-other", "there is a file of this name", where=str(folder))
    known = {"lock", "log.jsonl", RECIPE, "metrics.jsonl"}
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    strangers = [name for name in names if name not in known and not name.startswith(f".{RECORD}.")]
    if strangers:
        problem = f"the folder holds other files: {', '.join(sorted(strangers)[:3])}"
        raise LuthierError("run-folder-other", problem, where=str(folder))


def _refuse_changed(place: Place, prepared: Prepared) -> None:
    if place.record is not None and place.record["data"] != prepared.train.fingerprint:
        raise LuthierError("data-changed", "other rows than this run began with", where="data.train",
                           found=prepared.train.fingerprint)  # fmt: skip


def _record(recipe: Recipe, assembled: Assembled, place: Place) -> dict[str, Any]:
    """The run's record: a new one, or that of the run that goes on, if its data is the same."""
    if place.record is not None:
        _refuse_changed(place, assembled.prepared)
        return place.record
    run_id, parts = new_id(), [p.describe() for p in assembled.resolved]
    settings = recipe.to_dict()
    return {
        "run_id": run_id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "recipe_hash": recipe_hash(recipe),
        "seed": recipe.seed,
        "data": assembled.prepared.train.fingerprint,
        "parts": parts,
        "note": note(settings, run_id, parts, assembled.prepared),
        **environment(str(assembled.setup.device)),
    }


def _run(recipe: Recipe, assembled: Assembled, place: Place, record: dict[str, Any], resume: Path | None) -> Run:
    folder, setup = place.folder, assembled.setup
    run = ActiveRun(
        run_id=record["run_id"],
        folder=folder,
        name=recipe.run_name or folder.name,
        settings=recipe.to_dict(),
        total_steps=len(setup.rates),
        belongs={"recipe": record["recipe_hash"], "data": record["data"]},
    )
    loop = Loop(setup, run, assembled.callbacks)
    checkpoint.tidy(folder)
    with _recorded(loop, record):
        if place.record is None:
            recipe.write(folder / RECIPE)
        write_record(folder, record, state="running", total_steps=run.total_steps)
        _warn(assembled)
        with signals(run):
            _start(loop, resume)
            tally = loop.train()
        return _finish(loop, tally, record)


def _warn(assembled: Assembled) -> None:
    """What the preparation of the rows had to say, such as the share that was dropped."""
    report = assembled.prepared.report
    for warning in (*report.warnings, *(report.validation.warnings if report.validation else ())):
        log.warning("data", warning=warning)


def _start(loop: Loop, resume: Path | None) -> None:
    """From a checkpoint, if there is one, else from the beginning."""
    run = loop.run
    if resume is not None:
        loop.resume(checkpoint.load(resume))
        log.info("resumed", step=run.step, checkpoint=str(resume))
        return
    found = checkpoint.newest(run.folder)
    if found is None:
        log.info("run started", folder=str(run.folder), steps=run.total_steps)
        loop.hooks.run_started(run=run)
        return
    path, tree, damaged = found
    for error in damaged:
        log.warning("checkpoint damaged, using the one before", error=str(error))
    loop.resume(tree)
    log.warning("resumed", step=run.step, checkpoint=str(path))


def _finish(loop: Loop, tally: Tally, record: dict[str, Any]) -> Run:
    """The best weights if they were asked for, the artifact, the result."""
    setup, run = loop.setup, loop.run
    if setup.recipe.load_best_model_at_end:
        loop.load_best()
    artifact, merged = _artifacts(setup, run.folder, record["note"])
    result = Run(
        **{"run_id": run.run_id, "output_path": run.folder, "artifact": artifact, "merged": merged},
        **{"steps": tally.step, "samples_seen": tally.samples, "tokens_seen": tally.tokens},
        **{"final_loss": tally.losses[-1], "loss_history": tally.losses, "duration_seconds": tally.seconds},
        **{"eval_loss": tally.evaluation.get("eval_loss"), "eval_metrics": tally.evaluation},
        **{"best_checkpoint": loop.best_checkpoint(), "stop_reason": run.stop_reason, "parts": record["parts"]},
        setup=setup,
    )
    write_record(run.folder, record, state="completed", step=tally.step, result=result.to_dict())
    loop.hooks.completed(run=run, result=result)
    return result


def _artifacts(setup: Setup, folder: Path, note_: dict[str, Any]) -> tuple[Path, Path | None]:
    """The adapter's own files, and the merged model where the recipe asks for it."""
    model, tokenizer, adapter = setup.model, setup.tokenizer, setup.adapter
    with setup.optimizer_part.evaluating():
        artifact = save_adapter(model, tokenizer, adapter, folder / artifact_name(adapter), note_)
        if not setup.recipe.merge:
            return artifact, None
        return artifact, save_merged(model, tokenizer, adapter, setup.quantizer, folder / "merged", note_)


@contextlib.contextmanager
def _recorded(loop: Loop, record: dict[str, Any]) -> Iterator[None]:
    """However the run ends, run.json says so."""
    run = loop.run
    try:
        yield
    except Interrupted:
        write_record(run.folder, record, state="stopped", step=run.step)
        raise
    except BaseException as error:
        if checkpoint.is_full(error):
            error = LuthierError("disk-full", f"stopped at step {run.step}", where=str(run.folder))
        with contextlib.suppress(OSError):
            write_record(run.folder, record, state="failed", step=run.step, error=str(error))
        loop.hooks.failed(run=run, error=error)
        raise error
