"""A run whose steps a trainer takes: its checks, folder, model, record and artifact are those of any other run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.artifacts.note import Prompting, make_note
from luthier.artifacts.save import artifact_name, save_adapter, save_merged
from luthier.checkpoint.saver import Saver
from luthier.data.prompt_rows import PromptRow, hash_prompts, read_prompts
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.data.tokenise.examples_of_rows import Maker
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.hardware import devices
from luthier.logs import get_logger, run_log
from luthier.model import load
from luthier.model.attention import ordinary_attention
from luthier.model.generation.generate import PromptForm, prompt_ids
from luthier.model.weights import fingerprint
from luthier.model.weights.dense_files import Files
from luthier.model.weights.quantized import apply_quantizer, find_trained
from luthier.plugins.events import announce_failure, connect_callbacks
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe, recipe_hash
from luthier.recipe.objects import Objects
from luthier.recipe.parts import Resolved
from luthier.runs.writing import differences as changes
from luthier.runs.writing.active_run import ActiveRun
from luthier.runs.writing.lock import locked_folder
from luthier.runs.writing.record import RECIPE, new_id, record_environment, write_record
from luthier.runs.writing.target import Place, check_unchanged, find_place
from luthier.step.adapter_start import find_start, load_start
from luthier.step.attach import trained_groups
from luthier.step.attachment import BuiltParts
from luthier.step.context import ContextSources, attach_adapter, context_for, encode_with
from luthier.timestamp import current_time
from luthier.training.assemble import named
from luthier.training.finished import finished_run
from luthier.training.run import Run
from luthier.training.signals import handle_signals
from luthier.training.trainers.trainer_checks import check_trainer
from luthier.training.trainers.trainer_session import SteppedParts, TrainerSession

log = get_logger()


def train_elsewhere(recipe: Recipe, objects: Objects, *, resume: Path | None = None, fresh: bool = False) -> Run:
    """Let the recipe's trainer train to the end, and return the run; see `luthier.train`."""
    resolved = check_trainer(recipe)
    _check_call(resolved, objects, resume)
    place = find_place(recipe, objects, fresh=fresh)
    if place.done:
        log.warning("run already finished", folder=str(place.folder), remedy="--fresh trains again")
        return finished_run(place.folder, None, place.record)
    if place.record is not None:
        raise _no_resume(resolved, str(place.folder))
    with keep_randomness():
        session, note = _opened_session(recipe, objects, resolved, place)
        began = {"created": current_time(), "seed": recipe.seed, "run_id": session.run.run_id}
        record = {**began, **_facts(recipe, resolved, session), "note": note}
        with locked_folder(place.folder):
            check_unchanged(place)
            with run_log(session.run.run_id, place.folder / "log.jsonl"):
                return _run(session, record, resolved)


def _check_call(resolved: Resolved, objects: Objects, resume: Path | None) -> None:
    """Raise `part-unsupported` for what only Luthier's own loop can do."""
    name = resolved.trainer.name if resolved.trainer else ""
    if resume is not None:
        raise _no_resume(resolved, "resume")
    if World.current().size > 1:
        raise LuthierError("part-unsupported", f"trainer {name!r} trains in one process here", where="trainer",
                           remedy="Start one process.")  # fmt: skip
    for what in ("model", "tokenizer", "task"):
        if getattr(objects, what) is not None:
            raise LuthierError("part-unsupported", f"trainer {name!r} cannot be handed a loaded one", where=what,
                               remedy=f"Give the name or the folder of the {what}.")  # fmt: skip


def _no_resume(resolved: Resolved, where: str) -> LuthierError:
    name = resolved.trainer.name if resolved.trainer else ""
    remedy = "Start anew with --fresh; adapter_from begins with the weights of an adapter."
    return LuthierError("part-unsupported", f"trainer {name!r} cannot go on with a run that was cut off", where=where,
                        remedy=remedy)  # fmt: skip


def _opened_session(
    recipe: Recipe, objects: Objects, resolved: Resolved, place: Place
) -> tuple[TrainerSession, dict[str, Any]]:
    """Return the session of a run that is yet to begin, and the note of its artifact."""
    if find_trained(recipe.model.name_or_path) is not None:
        raise LuthierError("part-unsupported", "the base is a model with trained quantized layers", where="model",
                           remedy="Give a dense model.")  # fmt: skip
    start = find_start(recipe)
    callbacks = {name: resolved.build(part) for name, part in named(resolved.callbacks).items()}
    tokenizer = load.tokenizer_of(recipe.model)
    train, held = read_prompts(recipe.data, objects.data, objects.eval_data, seed=recipe.seed)
    template = _settled_template(recipe, tokenizer, train)
    train, held = (_fitting(rows, recipe, tokenizer) for rows in (train, held))
    assert resolved.trainer is not None, "the recipe names a trainer"
    resolved.build(resolved.trainer).check_rows(recipe, train, held)
    parts, model = BuiltParts.of_recipe(resolved), _loaded(recipe, resolved)
    model = _attached(recipe, parts, model, tokenizer)
    if start is not None:
        load_start(parts.adapter, start)
    optimizer = parts.optimizer.build(trained_groups(recipe, parts.adapter, model))
    for group in optimizer.param_groups:
        group["lr"] = float(recipe.learning_rate) * group.get("lr_scale", 1.0)
    run = ActiveRun(run_id=new_id(), folder=place.folder, name=recipe.run_name or place.folder.name,
                    settings=recipe.to_dict(), total_steps=recipe.max_steps)  # fmt: skip
    saver = Saver(place.folder, run.belongs, background=False, limit=recipe.save_total_limit)
    stepped = SteppedParts(adapter=parts.adapter, quantizer=parts.quantizer, optimizer=parts.optimizer,
                           hooks=connect_callbacks(callbacks), saver=saver,
                           switchable="reference" in resolved.adapter.chosen().provides)  # fmt: skip
    prompting = Prompting(plain=template is None, template_hash=template.hash if template else None)
    files = Files.of_recipe(recipe, model.dtype, getattr(parts.adapter, "save_dtype", None))
    note = make_note(run.settings, run.run_id, [p.describe() for p in resolved], prompting, files)  # type: ignore[arg-type]
    return TrainerSession(recipe=recipe, model=model, tokenizer=tokenizer, rows=train, validation=held,
                          optimizer=optimizer, run=run, parts=stepped), note  # fmt: skip


def _settled_template(recipe: Recipe, tokenizer: Any, rows: list[PromptRow]) -> ChatTemplate | None:
    """Return the chat template that the prompts go through, which the tokenizer takes over; None for plain texts."""
    if isinstance(rows[0].prompt, str):
        return None
    template = Maker.of(recipe.data, tokenizer).template
    if template is None:
        raise LuthierError("template-missing", "the prompts are messages", where=rows[0].where)
    tokenizer.chat_template = template.source
    return template


def _fitting(rows: list[PromptRow], recipe: Recipe, tokenizer: Any) -> list[PromptRow]:
    """Return the rows whose prompt is no longer than `data.max_length` tokens; the others as `data.overlong` says."""
    limit, kept = recipe.data.max_length, []
    for row in rows:
        length = len(prompt_ids(tokenizer, row.prompt, PromptForm(chat=not isinstance(row.prompt, str))))
        if length <= limit:
            kept.append(row)
        elif recipe.data.overlong == "error":
            raise LuthierError("data-overlong", f"its prompt has {length} tokens, more than {limit}", where=row.where)
    if rows and not kept:
        raise LuthierError("data-empty", f"every prompt is longer than {limit} tokens", where="data.max_length")
    if len(kept) < len(rows):
        log.warning("prompts dropped", longer_than=limit, dropped=len(rows) - len(kept), of=len(rows))
    return kept


def _loaded(recipe: Recipe, resolved: Resolved) -> Any:
    load.check_named_model(recipe.model)
    quantizer = resolved.build(resolved.quantizer)
    return load.load_model(recipe.model, devices.choose_device(recipe.device), quantizer.load_arguments())


def _attached(recipe: Recipe, parts: BuiltParts, model: Any, tokenizer: Any) -> Any:
    """Return the model with quantizer and adapter, computing by an attention of transformers' own."""

    def no_batches(count: int) -> Any:
        raise LuthierError("part-unsupported", "it asks for rows of the run, and a trainer has prompts alone",
                           where="adapter", remedy="Choose another start of the adapter.")  # fmt: skip

    name = recipe.model.name_or_path
    sources = ContextSources(seed=recipe.seed, total_steps=recipe.max_steps, batches=no_batches,
                             encode=encode_with(tokenizer),
                             original=lambda layer: load.original_weight(name, model, layer))  # fmt: skip
    model = apply_quantizer(parts.quantizer, model, context_for(model, parts.quantizer, sources))
    model = attach_adapter(parts.adapter, model, context_for(model, parts.quantizer, sources))
    model.set_attn_implementation(ordinary_attention(model))
    parts.adapter.begin_task(0, 1)
    return model


def _facts(recipe: Recipe, resolved: Resolved, session: TrainerSession) -> dict[str, Any]:
    return {
        "recipe_hash": recipe_hash(recipe),
        "data": hash_prompts(session.rows),
        "base": fingerprint.of_model(recipe.model.name_or_path),
        "parts": [part.describe() for part in resolved],
        **record_environment(str(session.model.device)),
    }


def _run(session: TrainerSession, record: dict[str, Any], resolved: Resolved) -> Run:
    run, began = session.run, time.monotonic()
    session.recipe.write(run.folder / RECIPE)
    run.belongs.update(changes.list_belongings(session.recipe, record))
    write_record(run.folder, record, state="running", total_steps=run.total_steps)
    assert resolved.trainer is not None
    trainer = resolved.build(resolved.trainer)
    with _recorded(session, record), session.parts.saver:
        with handle_signals(run.control):
            trainer.train(session)
        if not session.losses and run.signal is None:
            where, remedy = f"trainer {resolved.trainer.name}", "Give it rows and settings for one step at least."
            raise LuthierError("part-invalid", "it came to an end without a step", where=where, found=run.stop_reason,
                               remedy=remedy)  # fmt: skip
        if run.signal is not None:
            session.parts.hooks.stopped(run=run, step=run.step, reason=f"signal {run.signal}")
            raise LuthierError("interrupted", f"stopped by a signal after step {run.step}", where=str(run.folder),
                               remedy=f"luthier generate {run.folder} answers with its newest checkpoint.")  # fmt: skip
        return _finished(session, record, time.monotonic() - began)


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
    """However the run ends, run.json says so."""
    run = session.run
    try:
        yield
    except BaseException as error:
        is_stopped = isinstance(error, KeyboardInterrupt) or run.signal is not None
        state = "stopped" if is_stopped else "failed"
        with contextlib.suppress(OSError):
            write_record(run.folder, record, state=state, step=run.step, error=str(error))
        if not is_stopped:
            announce_failure(session.parts.hooks, run, error)
        raise
