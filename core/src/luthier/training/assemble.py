"""Assembly: a recipe into a `Setup`. Whatever can be refused is refused before the costly parts begin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch

from luthier.artifacts.untrained import check_artifact
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import Prepared
from luthier.data.stream.row_stream import Stream
from luthier.distributed.join import device_name
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.hardware import devices, threads
from luthier.logs import get_logger
from luthier.memory.case import Case
from luthier.memory.fit import settle_sizes
from luthier.model import load, recompute
from luthier.model.dropout import check_dropout
from luthier.model.generation.generate import teach_stops
from luthier.model.model_config import config_of
from luthier.model.operations.kernel_choice import find_kernels
from luthier.model.recurrent import decide_packing, separation_reason
from luthier.model.weights.loaded_weights import check_finite
from luthier.model.weights.quantized import check_quantizer, find_trained, read_quantized
from luthier.model.weights.stored_layers import is_stored
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Purpose
from luthier.precision import dtypes as precision
from luthier.recipe import Recipe
from luthier.recipe.checks.soundness import check_built_parts, check_parts, check_stored_base
from luthier.recipe.objects import Objects
from luthier.recipe.parts import Resolved, named_parts, resolve_parts
from luthier.recipe.settled import SettledRecipe
from luthier.runs.writing.decisions import Decisions
from luthier.step import compile_step as compiling
from luthier.step.attach import HOST, attach_parts, quantize_model
from luthier.step.attachment import Attachment, BuiltParts
from luthier.step.evaluation.metric_parts import settle_evaluation
from luthier.step.fit_checks import check_prompts, check_rooms, check_tokens, prepare_model
from luthier.step.reference.company import Company
from luthier.step.schedule.total_steps import check_length, feed_of
from luthier.step.setup import Setup
from luthier.training import strategy
from luthier.training.process_choice import settle_process
from luthier.training.rows import made_rows
from luthier.training.weightless import hollow_model, load_quantized

log = get_logger()


@attrs.define(kw_only=True, eq=False)
class Assembled:
    """A run that is ready to train. `case` is what was known of it before its model was loaded."""

    setup: Setup
    resolved: Resolved
    prepared: Prepared
    callbacks: dict[str, Any]
    case: Case


def assemble_run(recipe: Recipe, objects: Objects, decisions: Decisions | None = None, world: World | None = None,
             purpose: Purpose = "train", *, begins: bool = True, saves: bool = False) -> Assembled:  # fmt: skip
    """Return everything loaded and attached, nothing trained. `decisions` None: all new; `world` None: one process;
    `begins`: the run starts from the adapter that the recipe may name; `saves`: its artifact is tried untrained."""
    decisions, world = decisions or Decisions(), world or World()
    began, resolved = threads.Glance(), resolve_parts(recipe)
    device = usable_device(recipe, resolved, world)
    parts, kernels = BuiltParts.of_recipe(resolved), find_kernels(recipe, resolved, device)
    callbacks = {name: resolved.build(part) for name, part in named_parts(resolved.callbacks).items()}
    _check_named(recipe, objects)
    tokenizer = objects.tokenizer or load.tokenizer_of(recipe.model)
    prepared = made_rows(recipe, objects, tokenizer, Wanted.of_part(resolved.loss), world)
    config = _checked_config(recipe, objects, resolved)
    company = Company.of(recipe, resolved, begins=begins).checked(parts.loss, tokenizer, config)
    parts = attrs.evolve(parts, kernels=kernels, company=company)
    case = Case(recipe=recipe, resolved=resolved, loss=parts.loss, device=device, prepared=prepared, objects=objects,
                packing=_packs(recipe, objects, config, decisions), shares=world.size, ranks_here=world.local_size,
                purpose=purpose)  # fmt: skip
    check_rooms(prepared, recipe.data, case.tokens, case.layout)
    case.sharded = (how := strategy.choose_strategy(case, decisions, world)) == "fsdp"
    settled = settle_sizes(case, decisions, world)
    loading = functools.partial(_quantized, case, settled, parts.quantizer, decisions)
    model, purpose = load_quantized(case, settled, how, world, loading)
    prepare_model(model, tokenizer, prepared)
    setup = attach_parts(Attachment(recipe=settled, model=model, tokenizer=tokenizer, parts=parts, prepared=prepared,
                                    device=device, decisions=decisions, world=world, spread_as=how, task=case.task,
                                    purpose=purpose, attached=_tried(recipe, resolved) if saves else None))  # fmt: skip
    _check_batches(setup, prepared, settled)
    _settle_setup(setup, resolved, began)
    return Assembled(setup=setup, resolved=resolved, prepared=prepared, callbacks=callbacks, case=case)


def _tried(recipe: Recipe, resolved: Resolved) -> Callable[[Attachment, Any], None]:
    """Return what tries a model's artifact, untrained."""
    return functools.partial(check_artifact, recipe, resolved)


def _checked_config(recipe: Recipe, objects: Objects, resolved: Resolved) -> Any:
    """Return the model's config; `part-incompatible` for a quantized one below a part that wants dense weights."""
    config = config_of(recipe.model) if objects.model is None else getattr(objects.model, "config", None)
    if is_stored(config):
        check_stored_base(resolved.chosen())
    if recipe.model.dropout is not None:
        check_dropout(objects.model or hollow_model(recipe), recipe.model.dropout)
    return config


def _packs(recipe: Recipe, objects: Objects, config: Any, decisions: Decisions) -> bool:
    """Return whether documents share a pass; a model that is only named is looked at without its weights."""
    if not recipe.packing or config is None:
        return recipe.packing
    model = objects.model
    reason = separation_reason(config, model)
    if reason is None and model is None:
        reason = separation_reason(config, hollow_model(recipe))
    return decide_packing(reason, decisions)


def _check_named(recipe: Recipe, objects: Objects) -> None:
    """Look at the files of a model that is named, unless its quantizer reads them."""
    if objects.model is None and find_trained(recipe.model.name_or_path) is None:
        load.check_named_model(recipe.model)


def _check_batches(setup: Setup, prepared: Prepared, recipe: SettledRecipe) -> None:
    """Check that micro-batches hold what the adapter puts before each row, and the tokens that the quantizer needs."""
    check_prompts(prepared, recipe, setup.packing, setup.model)
    check_tokens(setup)


def _settle_setup(setup: Setup, resolved: Resolved, began: threads.Glance) -> None:
    """Set what depends on the loss's record, the process and the compiler."""
    if setup.recipe.merge:
        check_built_parts(setup.adapter, setup.quantizer, resolved)
    setup.process = settle_process(setup, began)
    setup.undo.enter_context(setup.process.applied())
    compiling.settle_compile(setup)
    settle_evaluation(setup, resolved)
    _tell_short_end(setup, resolved)


def _tell_short_end(setup: Setup, resolved: Resolved) -> None:
    """Log that an epoch ends with a group of fewer units than the loss compares."""
    least = getattr(resolved.loss.record or resolved.loss.local, "least_batch", 1)
    train, size = setup.train, setup.recipe.global_batch_size
    if isinstance(train, Stream) or not 0 < len(train) % size < least:
        return
    last, total = len(train) % size, setup.feed.total
    if total is None or total * size > len(train) - last:
        reason = f"the loss {resolved.loss.name} compares {least} or more units of a global batch"
        log.warning("the last group of an epoch teaches nothing", units=last, because=reason,
                    remedy="another global_batch_size, or max_rows")  # fmt: skip


def _refuse_trainer(resolved: Resolved) -> None:
    """Raise `part-unsupported` where a recipe names a trainer: what is asked for is done by Luthier's own loop."""
    if resolved.trainer is not None:
        problem = f"trainer {resolved.trainer.name!r} takes the steps of this recipe, and this is of Luthier's own loop"
        remedy = "Leave trainer out, or use `luthier train`, `generate`, `merge` and `export`."
        raise LuthierError("part-unsupported", problem, where="trainer", remedy=remedy)


def usable_device(recipe: Recipe, resolved: Resolved, world: World) -> torch.device:
    """Return the run's device; what the parts, the device or the length cannot do is refused."""
    _refuse_trainer(resolved)
    device = devices.choose_device(device_name(recipe.device, world))
    check_parts(recipe, resolved, device.type)
    check_quantizer(recipe.model.name_or_path, resolved.quantizer.to_plain())
    precision.refuse_precision(recipe.precision, device)
    recompute.refuse_recompute(recipe.gradient_checkpointing, device)
    compiling.refuse_compile(recipe.torch_compile, device)
    check_length(recipe)
    return device


def whole_again(assembled: Assembled) -> Setup:
    """Return a setup of newly built parts on the model as its files have it, whole and in this process alone."""
    resolved, setup_before, case = assembled.resolved, assembled.setup, assembled.case
    recipe = setup_before.recipe
    parts = attrs.evolve(BuiltParts.of_recipe(resolved), kernels=find_kernels(recipe, resolved, HOST))
    model = _quantized(case, recipe, parts.quantizer, setup_before.decisions, HOST, "open")
    teach_stops(model, setup_before.tokenizer, assembled.prepared.stop_tokens)
    setup = attach_parts(Attachment(recipe=recipe, model=model, tokenizer=setup_before.tokenizer, parts=parts,
                                    prepared=assembled.prepared, device=HOST, decisions=setup_before.decisions,
                                    purpose="open", task=case.task))  # fmt: skip
    setup.progress = setup_before.progress
    return setup


def _quantized(
    case: Case,
    recipe: SettledRecipe,
    quantizer: Quantizer,
    decisions: Decisions,
    device: torch.device,
    purpose: Purpose | None = None,
) -> Any:
    """Return the base model in its quantizer's form; on `meta` it has no weights. `purpose` None: the case's."""
    trained = None if case.objects.model is not None else find_trained(recipe.model.name_or_path)
    feed, purpose = feed_of(recipe, case.prepared.train), purpose or case.purpose
    quantized = functools.partial(quantize_model, recipe, feed, quantizer=quantizer, decisions=decisions)
    if device.type == "meta":
        return quantized(hollow_model(recipe), purpose="hollow")
    if trained is None:
        return quantized(_model(case, quantizer, device), purpose=purpose)
    model = quantized(load.empty_model(trained, device), purpose=purpose, blank=True)
    return read_quantized(quantizer, trained, model)


def _model(case: Case, quantizer: Quantizer, device: torch.device) -> Any:
    """Return the model that was handed over, moved to the device, or the one that is named, read from its files."""
    given = case.objects.model
    if given is None:
        return load.load_model(case.recipe.model, device, quantizer.load_arguments())
    load.check_causal(given)
    given = given.to(device)
    check_finite(given, "model")
    return given
