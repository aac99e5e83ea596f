"""The opening of a trainer's run: its prompts, its model with parts, its optimizer, and the session of all these."""

from __future__ import annotations

from typing import Any

import attrs

from luthier.artifacts.note import Prompting, make_note
from luthier.checkpoint.saver import Cadence, Saver
from luthier.data.prompt_rows import PromptRow, hash_prompts, read_prompts
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.data.tokenise.examples_of_rows import Maker
from luthier.errors import LuthierError
from luthier.hardware import devices
from luthier.logs import get_logger
from luthier.model import load
from luthier.model.attention import ordinary_attention
from luthier.model.dropout import check_dropout, set_rates
from luthier.model.generation.generate import PromptForm, prompt_ids
from luthier.model.weights import fingerprint
from luthier.model.weights.dense_files import Files
from luthier.model.weights.quantized import apply_quantizer, find_trained
from luthier.plugins.contracts.side_protocols import Penalty
from luthier.plugins.events import connect_callbacks
from luthier.recipe import Recipe, recipe_hash
from luthier.recipe.objects import Objects
from luthier.recipe.parts import Resolved, named_parts
from luthier.runs.writing.active_run import ActiveRun
from luthier.runs.writing.record import new_id, record_environment
from luthier.runs.writing.target import Place
from luthier.step.adapter_start import find_start, load_start
from luthier.step.attach import trained_groups
from luthier.step.attachment import BuiltParts
from luthier.step.context import ContextSources, attach_adapter, context_for, encode_with
from luthier.step.start_weights import keep_start
from luthier.training.trainers.trainer_session import SteppedParts, TrainerSession

log = get_logger()


@attrs.frozen(kw_only=True)
class Prompts:
    """The prompts of a run, and the chat template that they go through; None for plain texts."""

    train: list[PromptRow]
    validation: list[PromptRow]
    template: ChatTemplate | None


def open_session(
    recipe: Recipe, objects: Objects, resolved: Resolved, place: Place, trainer: Any, *, begins: bool
) -> tuple[TrainerSession, dict[str, Any]]:
    """Return the session of a run that begins, or is yet to be restored, and its record as it would be now."""
    if find_trained(recipe.model.name_or_path) is not None:
        raise LuthierError("part-unsupported", "the base is a model with trained quantized layers", where="model",
                           remedy="Give a dense model.")  # fmt: skip
    start, tokenizer = find_start(recipe), load.tokenizer_of(recipe.model)
    callbacks = {name: resolved.build(part) for name, part in named_parts(resolved.callbacks).items()}
    prompts = _read(recipe, objects, tokenizer)
    trainer.check_rows(recipe, prompts.train, prompts.validation)
    parts, model = BuiltParts.of_recipe(resolved), _loaded(recipe, resolved)
    model = _attached(recipe, parts, model, tokenizer)
    if begins:
        parts.adapter.begin_task(0, 1)
    if start is not None:
        load_start(parts.adapter, start)
    run = ActiveRun(run_id=(place.record or {}).get("run_id") or new_id(), folder=place.folder,
                    name=recipe.run_name or place.folder.name, settings=recipe.to_dict(),
                    total_steps=recipe.max_steps)  # fmt: skip
    saver = Saver(place.folder, run.belongs, background=False, limit=recipe.save_total_limit)
    stepped = SteppedParts(adapter=parts.adapter, quantizer=parts.quantizer, optimizer=parts.optimizer,
                           trainer=trainer, hooks=connect_callbacks(callbacks), callbacks=callbacks, saver=saver,
                           cadence=Cadence.of(recipe), penalties=_begun(parts),
                           switchable="reference" in resolved.adapter.chosen().provides)  # fmt: skip
    session = TrainerSession(recipe=recipe, model=model, tokenizer=tokenizer, rows=prompts.train,
                             validation=prompts.validation, optimizer=_optimizer(recipe, parts, model), run=run,
                             parts=stepped)  # fmt: skip
    return session, _facts(session, [part.describe() for part in resolved], prompts)


def _begun(parts: BuiltParts) -> tuple[Penalty, ...]:
    """Return the penalties, which know the weights as they are now, before a checkpoint is restored."""
    penalties = parts.weight_penalties
    for start in keep_start(parts.adapter, penalties).values():
        for penalty in penalties:
            penalty.begin(start.groups)
    return penalties


def _read(recipe: Recipe, objects: Objects, tokenizer: Any) -> Prompts:
    """Return the prompts that fit; the tokenizer takes over their template."""
    train, validation = read_prompts(recipe.data, objects.data, objects.eval_data, seed=recipe.seed)
    template = _settled_template(recipe, tokenizer, train)
    train, validation = (_fitting(rows, recipe, tokenizer) for rows in (train, validation))
    return Prompts(train=train, validation=validation, template=template)


def _optimizer(recipe: Recipe, parts: BuiltParts, model: Any) -> Any:
    """Return the recipe's optimizer at the recipe's learning rate."""
    optimizer = parts.optimizer.build(trained_groups(recipe, parts.adapter, model))
    for group in optimizer.param_groups:
        group["lr"] = float(recipe.learning_rate) * group.get("lr_scale", 1.0)
    return optimizer


def _facts(session: TrainerSession, described: list[dict[str, Any]], prompts: Prompts) -> dict[str, Any]:
    """Return what the record says of a run as it is now, besides when it began."""
    recipe, run, template = session.recipe, session.run, prompts.template
    prompting = Prompting(plain=template is None, template_hash=template.hash if template else None)
    files = Files.of_recipe(recipe, session.model.dtype, getattr(session.parts.adapter, "save_dtype", None))
    return {
        "run_id": run.run_id,
        "recipe_hash": recipe_hash(recipe),
        "data": hash_prompts(session.rows),
        "base": fingerprint.of_model(recipe.model.name_or_path),
        "parts": described,
        "note": make_note(recipe.to_dict(), run.run_id, described, prompting, files),
        **record_environment(str(session.model.device)),
    }


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
    limit, fitting = recipe.data.max_length, []
    for row in rows:
        length = len(prompt_ids(tokenizer, row.prompt, PromptForm(chat=not isinstance(row.prompt, str))))
        if length <= limit:
            fitting.append(row)
        elif recipe.data.overlong == "error":
            raise LuthierError("data-overlong", f"its prompt has {length} tokens, more than {limit}", where=row.where)
    if rows and not fitting:
        raise LuthierError("data-empty", f"every prompt is longer than {limit} tokens", where="data.max_length")
    if len(fitting) < len(rows):
        log.warning("prompts dropped", longer_than=limit, dropped=len(rows) - len(fitting), of=len(rows))
    return fitting


def _loaded(recipe: Recipe, resolved: Resolved) -> Any:
    load.check_named_model(recipe.model)
    quantizer = resolved.build(resolved.quantizer)
    model = load.load_model(recipe.model, devices.choose_device(recipe.device), quantizer.load_arguments())
    check_dropout(model, recipe.model.dropout)
    set_rates(model, recipe.model.dropout)
    return model


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
    return model
