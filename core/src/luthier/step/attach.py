"""Attachment: a model with its quantizer, its adapter, and all that a step needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from luthier.data.batches.batch import Batch
from luthier.data.batches.example_feed import Feed
from luthier.data.batches.micro_batches import rank_batches
from luthier.data.batches.packing import Packing
from luthier.data.prepare import Prepared
from luthier.distributed.spread import Strategy
from luthier.distributed.world import World
from luthier.distributed.wrap import wrap_step
from luthier.errors import LuthierError
from luthier.model import attention, load, recompute
from luthier.model import self_check as probe
from luthier.model.operations.kernel_choice import operate_as_chosen
from luthier.model.recurrent import separation_reason
from luthier.model.weights.dense_files import Files
from luthier.model.weights.parameter_groups import scale_groups
from luthier.model.weights.quantized import apply_quantizer
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Context, Group, Purpose
from luthier.precision import dtypes as precision
from luthier.recipe import Recipe
from luthier.runs.writing.decisions import Decisions
from luthier.step.context import WHOLE, context_for, dense_weight
from luthier.step.losses.unit_layout import lay_out_feed
from luthier.step.module import Step
from luthier.step.reference.company import attach_begun, company_of
from luthier.step.schedule.total_steps import feed_of, rates_of
from luthier.step.setup import Setup

HOST: Final = torch.device("cpu")


BUILT = ("adapter", "loss", "optimizer", "quantizer")


def quantize_model(
    recipe: Recipe, feed: Feed, model: Any, quantizer: Quantizer, purpose: Purpose, *, blank: bool = False
) -> Any:
    """Return the model in its quantizer's form; `blank`: its weights are still to be read."""
    told = {"log": lambda *_: None, "total_steps": feed.total, "purpose": purpose}
    context = _context(recipe, model, quantizer, _head(recipe, feed, model.device), **told)
    return apply_quantizer(quantizer, model, attrs.evolve(context, has_values=context.has_values and not blank))


def _head(recipe: Recipe, feed: Feed, device: torch.device) -> Callable[[int], Iterable[Batch]]:
    """Return a function that gives the first n examples in micro-batches, where the weights lie."""
    alone = Packing(max_tokens=recipe.max_tokens_per_device, on=recipe.packing)
    place = HOST if device.type == "meta" else device
    return lambda count: rank_batches(feed.head(count), alone, place)


def attach_parts(recipe: Recipe, model: Any, tokenizer: Any, built: dict[str, Any], prepared: Prepared,
                 device: torch.device, decisions: Decisions, world: World | None = None,
                 spread_as: Strategy = "alone", *, purpose: Purpose = "train") -> Setup:  # fmt: skip
    """The model with its adapter and all that a step needs; without weights (a rehearsal) no number is looked at."""
    with ExitStack() as undo:
        told = {"purpose": purpose, "undo": undo, "spread_as": spread_as}
        setup = _attached(recipe, model, tokenizer, built, prepared, device, decisions, world or World(), **told)
        undo.push(setup.undo)  # should a companion not be had
        company_of(built).join(setup, purpose)
        undo.pop_all()
    return setup


def _attached(recipe: Recipe, model: Any, tokenizer: Any, built: dict[str, Any], prepared: Prepared,
              device: torch.device, decisions: Decisions, world: World, *, purpose: Purpose, undo: ExitStack,
              spread_as: Strategy) -> Setup:  # fmt: skip
    feed = lay_out_feed(feed_of(recipe, prepared.train), recipe, built["loss"], prepared.train, model, decisions)
    alone = Packing(max_tokens=recipe.max_tokens_per_device, on=recipe.packing)
    before, numbers, has_weights = attention.install_attention(model), {}, purpose in WHOLE
    told = {"log": numbers.__setitem__, "total_steps": feed.total, "purpose": purpose, "decisions": decisions}
    told["save_dtype"] = getattr(built["adapter"], "save_dtype", None)
    context = _context(recipe, model, built["quantizer"], lambda n: rank_batches(feed.head(n), alone, device), **told)
    model = attach_begun(built, model, context)
    operations = undo.enter_context(operate_as_chosen(recipe, model, built, decisions, purpose, spread_as))
    if has_weights:
        _probe_model(recipe, model, built)
    computed = precision.settle_precision(recipe, model, built, device, decisions, undo, sharded=spread_as == "fsdp")
    attention.decide_attention(model, device, precision.COMPUTED_IN.get(computed.name) or model.dtype, decisions)
    if has_weights and computed.is_low:
        _probe_model(recipe, model, built, computed.computing)
    undo.enter_context(recompute.install_recompute(model, recipe.gradient_checkpointing))  # around those forwards
    step = _step(recipe, model, built, computed.computing)
    spread = wrap_step(step, model, spread_as, world, device, exchanged=computed.name == "pure_bf16")
    optimizer = built["optimizer"].build(trained_groups(recipe, built["adapter"], model))
    return Setup(
        **{"recipe": recipe, "model": model, "tokenizer": tokenizer, "context": context, "device": device},
        **{"adapter": built["adapter"], "loss": built["loss"], "quantizer": built["quantizer"]},
        **{"optimizer_part": built["optimizer"], "optimizer": optimizer, "rates": rates_of(recipe, feed.total)},
        packing=alone.for_rank(world.rank, world.size, step.policy.body.virtual_tokens),
        **{"train": prepared.train, "validation": prepared.validation, "report": prepared.report, "feed": feed},
        **{"attention": before, "operations": operations, "numbers": numbers, "decisions": decisions},
        **{"step": step, "spread": spread, "world": world, "precision": computed, "undo": undo.pop_all()},
    )


def _probe_model(recipe: Recipe, model: Any, built: dict[str, Any], computing: probe.Computing = nullcontext) -> None:
    """Compare the ways in which the run computes. Without packing, too, the documents of one unit share a pass."""
    together = separation_reason(model.config, model) is None and (recipe.packing or built["loss"].data != "tokens")
    probe.check_architecture(model, packing=together, computing=computing, adapter=built["adapter"])


def _step(recipe: Recipe, model: Any, built: dict[str, Any], computing: Any) -> Step:
    router = _router(recipe, model)
    return Step(model, built["adapter"], built["loss"], router_coefficient=router, computing=computing)


def _context(
    recipe: Recipe,
    model: Any,
    quantizer: Any,
    head: Callable[[int], Iterable[Any]],
    *,
    purpose: Purpose,
    save_dtype: str | None = None,
    **told: Any,
) -> Context:
    """What parts may know; `head(n)` gives the first n examples in micro-batches."""

    def original(layer: nn.Module) -> Tensor:
        if purpose not in WHOLE:
            return dense_weight(layer, quantizer)
        return load.original_weight(recipe.model.name_or_path, model, layer)

    context = context_for(
        model,
        quantizer,
        purpose=purpose,
        seed=recipe.seed,
        files=functools.partial(Files.of_recipe, recipe, model.dtype, save_dtype),
        original=original,
        batches=lambda n: _first_batches(n, recipe.global_batch_size, head),
        **told,
    )
    return attrs.evolve(context, probe=functools.partial(context.probe, packing=recipe.packing))


def _first_batches(count: int, step: int, head: Callable[[int], Iterable[Batch]]) -> list[Batch]:
    """Return the first `count` packed batches; fewer only where the data has no more."""
    rows, before, made = count * step, -1, list(head(count * step))
    while len(made) < count and before < sum(batch.num_units for batch in made):
        rows, before = 2 * rows, sum(batch.num_units for batch in made)
        made = list(head(rows))
    return made[:count]


def trained_groups(recipe: Recipe, adapter: Any, model: Any) -> list[Group]:
    """The adapter's groups, of which at least one must hold something, with the rates that the recipe gives them."""
    groups = [g for g in adapter.groups() if g.parameters]
    if not groups:
        raise LuthierError("train-nothing", "the adapter leaves no parameter to train", where="adapter")
    return scale_groups(groups, model, decay=recipe.layerwise_lr_decay, multipliers=recipe.lr_multipliers)


def _router(recipe: Recipe, model: Any) -> float:
    """The weight of the load-balancing loss: the recipe's, or the model's own where its config asks for one."""
    config = model.config
    if recipe.router_aux_loss_coef is not None:
        if recipe.router_aux_loss_coef and not hasattr(config, "num_experts_per_tok"):
            raise LuthierError("recipe-conflict", "the model has no experts", where="router_aux_loss_coef",
                               remedy="Leave it out.")  # fmt: skip
        return recipe.router_aux_loss_coef
    return (
        float(getattr(config, "router_aux_loss_coef", 0.0)) if getattr(config, "output_router_logits", False) else 0.0
    )
