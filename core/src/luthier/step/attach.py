"""Attachment: a model with its quantizer, its adapter, and all that a step needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from luthier.data.batches.batch import Batch
from luthier.data.batches.example_feed import Feed
from luthier.data.batches.layout import LaidOutFeed
from luthier.data.batches.micro_batches import rank_batches
from luthier.data.batches.packing import Packing
from luthier.distributed.wrap import wrap_step
from luthier.errors import LuthierError
from luthier.model import attention, load, recompute
from luthier.model import self_check as probe
from luthier.model.dropout import check_dropout, dropping
from luthier.model.operations.kernel_choice import operate_as_chosen
from luthier.model.recurrent import separation_reason
from luthier.model.weights.dense_files import Files
from luthier.model.weights.parameter_groups import scale_groups
from luthier.model.weights.quantized import apply_quantizer
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.plugins.contracts.values import Context, Group, Purpose
from luthier.precision import dtypes as precision
from luthier.recipe import Recipe
from luthier.recipe.settled import SettledRecipe
from luthier.runs.writing.decisions import Decisions
from luthier.step.attachment import Attachment, BuiltParts
from luthier.step.context import WHOLE, ContextSources, context_for, dense_weight, encode_with
from luthier.step.losses.unit_layout import lay_out_feed
from luthier.step.module import Step
from luthier.step.schedule.total_steps import feed_of, rates_of
from luthier.step.setup import Setup
from luthier.step.start_weights import keep_start

HOST: Final = torch.device("cpu")


def quantize_model(
    recipe: SettledRecipe,
    feed: Feed,
    model: Any,
    quantizer: Quantizer,
    purpose: Purpose,
    *,
    blank: bool = False,
    decisions: Decisions | None = None,
) -> Any:
    """Return the model in its quantizer's form; `blank`: its weights are still to be read. It keeps its decisions."""
    head = _head(recipe, feed, HOST if model.device.type == "meta" else model.device)
    sources = _sources(recipe, model, quantizer, head, purpose)
    sources = attrs.evolve(sources, total_steps=feed.total, decisions=decisions or sources.decisions)
    context = _context(recipe, model, quantizer, sources)
    return apply_quantizer(quantizer, model, attrs.evolve(context, has_values=context.has_values and not blank))


def _head(recipe: SettledRecipe, feed: Feed | LaidOutFeed, place: torch.device) -> Callable[[int], Iterable[Batch]]:
    """Return a function that gives the first n examples in micro-batches on a device."""
    alone = Packing(max_tokens=recipe.max_tokens_per_device, on=recipe.packing)
    return lambda count: rank_batches(feed.head(count), alone, place)


def attach_parts(attachment: Attachment) -> Setup:
    """Return the model with its adapter and all that a step needs; without weights (a rehearsal) no number is looked
    at.
    """
    with ExitStack() as undo:
        undo.enter_context(_wanted_dropout(attachment))
        setup = _attached(attachment, undo)
        undo.push(setup.undo)  # undone if a companion cannot be loaded
        attachment.parts.company.join(setup, attachment.purpose)
        if attachment.purpose != "open":
            setup.constant_owners |= keep_start(setup.adapter, setup.penalties)
        undo.pop_all()
    return setup


def _wanted_dropout(attachment: Attachment) -> AbstractContextManager[None]:
    """Return the context in which the model has the dropout that the recipe, or else the loss, wants."""
    if attachment.purpose == "open":
        return nullcontext()
    asked = attachment.recipe.model.dropout
    check_dropout(attachment.model, asked)
    return dropping(attachment.model, 0.0 if asked is None and not attachment.parts.dropout else asked)


def _attached(attachment: Attachment, undo: ExitStack) -> Setup:
    recipe, parts, prepared, world = attachment.recipe, attachment.parts, attachment.prepared, attachment.world
    feed = lay_out_feed(feed_of(recipe, prepared.train), recipe, parts.loss, prepared.train, attachment.model,
                        attachment.decisions)  # fmt: skip
    before, numbers = attention.install_attention(attachment.model), dict[str, float]()
    context = _adapters_context(attachment, feed, numbers)
    model = parts.company.attach(parts.adapter, attachment.model, context)
    if attachment.attached is not None:
        attachment.attached(attachment, model)
    operations = undo.enter_context(operate_as_chosen(recipe, model, parts.kernels, attachment.decisions,
                                                      attachment.purpose, attachment.spread_as))  # fmt: skip
    computed = _settle_computing(attachment, model, undo)
    # it wraps the forwards that were installed before
    undo.enter_context(recompute.install_recompute(model, recipe.gradient_checkpointing))
    step = _step(recipe, model, parts, computed.computing)
    spread = wrap_step(step, model, attachment.spread_as, world, attachment.device,
                       exchanged=computed.name == "pure_bf16")  # fmt: skip
    optimizer = parts.optimizer.build(trained_groups(recipe, parts.adapter, model))
    alone = Packing(max_tokens=recipe.max_tokens_per_device, on=recipe.packing)
    return Setup(
        recipe=recipe, model=model, tokenizer=attachment.tokenizer, context=context, device=attachment.device,
        adapter=parts.adapter, loss=parts.loss, quantizer=parts.quantizer, optimizer_part=parts.optimizer,
        penalties=parts.weight_penalties, optimizer=optimizer, rates=rates_of(recipe, feed.total), feed=feed,
        packing=alone.for_rank(world.rank, world.size, step.policy.body.virtual_tokens),
        train=prepared.train, validation=prepared.validation, report=prepared.report,
        attention=before, operations=operations, numbers=numbers, decisions=attachment.decisions,
        step=step, spread=spread, world=world, precision=computed, undo=undo.pop_all(),
    )  # fmt: skip


def _settle_computing(attachment: Attachment, model: Any, undo: ExitStack) -> precision.Precision:
    """Decide precision and attention; a model with weights is probed before and, where numbers are coarser, after."""
    recipe, parts, decisions = attachment.recipe, attachment.parts, attachment.decisions
    has_weights = attachment.purpose in WHOLE
    if has_weights:
        _probe_model(recipe, model, parts)
    computed = precision.settle_precision(recipe, model, parts, attachment.device, decisions, undo,
                                          sharded=attachment.spread_as == "fsdp")  # fmt: skip
    dtype = precision.COMPUTED_IN.get(computed.name) or model.dtype
    attention.decide_attention(model, attachment.device, dtype, decisions)
    if has_weights and computed.is_low:
        _probe_model(recipe, model, parts, computed.computing)
    return computed


def _probe_model(
    recipe: SettledRecipe, model: Any, parts: BuiltParts, computing: probe.Computing = nullcontext
) -> None:
    """Compare the ways in which the run computes. Without packing, too, the documents of one unit share a pass."""
    together = separation_reason(model.config, model) is None and (recipe.packing or parts.loss.data != "tokens")
    probe.check_architecture(model, packing=together, computing=computing, adapter=parts.adapter)


def _step(recipe: SettledRecipe, model: Any, parts: BuiltParts, computing: probe.Computing) -> Step:
    router = _router(recipe, model)
    return Step(model, parts.adapter, parts.loss, penalties=parts.penalties, router_coefficient=router,
                computing=computing)  # fmt: skip


def _adapters_context(attachment: Attachment, feed: LaidOutFeed, numbers: dict[str, float]) -> Context:
    """Return what the adapter may know; the numbers that parts log go to `numbers`."""
    recipe, model, adapter = attachment.recipe, attachment.model, attachment.parts.adapter
    head = _head(recipe, feed, attachment.device)
    sources = _sources(recipe, model, attachment.parts.quantizer, head, attachment.purpose)
    files = functools.partial(Files.of_recipe, recipe, model.dtype, getattr(adapter, "save_dtype", None))
    sources = attrs.evolve(sources, total_steps=feed.total, log=numbers.__setitem__, files=files,
                           decisions=attachment.decisions, encode=encode_with(attachment.tokenizer))  # fmt: skip
    context, task = _context(recipe, model, attachment.parts.quantizer, sources), attachment.task
    return attrs.evolve(context, dropout=attachment.parts.dropout, task_index=task.index, num_tasks=task.total)


def _sources(
    recipe: SettledRecipe, model: Any, quantizer: Quantizer, head: Callable[[int], Iterable[Batch]], purpose: Purpose
) -> ContextSources:
    """Return what a context asks; `head(n)` gives the first n examples in micro-batches."""

    def original(layer: nn.Module) -> Tensor:
        if purpose not in WHOLE:
            return dense_weight(layer, quantizer)
        return load.original_weight(recipe.model.name_or_path, model, layer)

    return ContextSources(
        seed=recipe.seed,
        purpose=purpose,
        files=functools.partial(Files.of_recipe, recipe, model.dtype, None),
        original=original,
        batches=lambda n: _first_batches(n, recipe.global_batch_size, head),
    )


def _context(recipe: SettledRecipe, model: Any, quantizer: Quantizer, sources: ContextSources) -> Context:
    context = context_for(model, quantizer, sources)
    return attrs.evolve(context, probe=functools.partial(context.probe, packing=recipe.packing))


def _first_batches(count: int, step: int, head: Callable[[int], Iterable[Batch]]) -> list[Batch]:
    """Return the first `count` packed batches; fewer only where the data has no more."""
    rows, before, made = count * step, -1, list(head(count * step))
    while len(made) < count and before < sum(batch.num_units for batch in made):
        rows, before = 2 * rows, sum(batch.num_units for batch in made)
        made = list(head(rows))
    return made[:count]


def trained_groups(recipe: Recipe, adapter: Adapter, model: Any) -> list[Group]:
    """Return the adapter's groups, of which at least one must hold something, with the rates that the recipe gives
    them.
    """
    groups = [g for g in adapter.groups() if g.parameters]
    if not groups:
        raise LuthierError("train-nothing", "the adapter leaves no parameter to train", where="adapter")
    return scale_groups(groups, model, decay=recipe.layerwise_lr_decay, multipliers=recipe.lr_multipliers)


def _router(recipe: SettledRecipe, model: Any) -> float:
    """Return the weight of the load-balancing loss: the recipe's, or the model's own where its config asks for one."""
    config = model.config
    if recipe.router_aux_loss_coef is not None:
        if recipe.router_aux_loss_coef and not hasattr(config, "num_experts_per_tok"):
            raise LuthierError("recipe-conflict", "the model has no experts", where="router_aux_loss_coef",
                               remedy="Leave it out.")  # fmt: skip
        return recipe.router_aux_loss_coef
    return (
        float(getattr(config, "router_aux_loss_coef", 0.0)) if getattr(config, "output_router_logits", False) else 0.0
    )
