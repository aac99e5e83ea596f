"""Assembly: a recipe into a `Setup`. Whatever can be refused is refused before the costly parts begin."""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import torch

from luthier.artifacts.generate import teach_stops
from luthier.data.examples import TokenDataset
from luthier.data.order import Order
from luthier.data.prepare import Prepared, check_vocabulary, prepare
from luthier.engine import attention, devices, load, probe, schedule
from luthier.engine.contexts import context_for
from luthier.engine.setup import Setup, batches
from luthier.engine.step import Step
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.plugins.registry import Plugins
from luthier.recipe import Recipe
from luthier.recipe.parts import Part, Resolved, resolve
from luthier.recipe.soundness import check_parts

log = get_logger()

BUILT = ("adapter", "loss", "optimizer", "quantizer")


@attrs.frozen(kw_only=True)
class Objects:
    """What a caller in Python hands over in the place of names."""

    model: Any = None
    tokenizer: Any = None
    data: Any = None
    eval_data: Any = None


@attrs.define(kw_only=True, eq=False)
class Assembled:
    setup: Setup
    resolved: Resolved
    prepared: Prepared
    callbacks: dict[str, Any]


def assemble(recipe: Recipe, objects: Objects, plugins: Plugins | None = None) -> Assembled:
    """Everything loaded, checked and attached, with nothing trained."""
    resolved = resolve(recipe, plugins)
    device = devices.choose(recipe.device)
    check_parts(recipe, resolved, device.type)
    built = {kind: resolved.build(getattr(resolved, kind)) for kind in BUILT}
    callbacks = {name: resolved.build(part) for name, part in named(resolved.callbacks).items()}
    tokenizer = objects.tokenizer or load.tokenizer_of(recipe.model)
    prepared = prepared_data(recipe, objects, tokenizer, built["loss"])
    if prepared.chat_template is not None:
        tokenizer.chat_template = prepared.chat_template  # what was trained on is what is saved
    model = _model(recipe, objects, built["quantizer"], device)
    teach_stops(model, tokenizer, prepared.stop_tokens)
    for dataset in (prepared.train, prepared.validation):
        if dataset is not None:
            check_fit(dataset, tokenizer, model)
    setup = _attach(recipe, model, tokenizer, built, prepared, device)
    return Assembled(setup=setup, resolved=resolved, prepared=prepared, callbacks=callbacks)


def named(parts: tuple[Part, ...]) -> dict[str, Part]:
    """Callbacks under names that state can be stored by."""
    found: dict[str, Part] = {}
    for part in parts:
        name, number = part.name, 2
        while name in found:
            name, number = f"{part.name}-{number}", number + 1
        found[name] = part
    return found


def prepared_data(recipe: Recipe, objects: Objects, tokenizer: Any, loss: Any) -> Prepared:
    """The rows as token examples; refused where the longest does not fit a micro-batch."""
    if loss.data != "tokens":
        problem = f"the loss takes {loss.data} examples, which are not trained yet"
        raise LuthierError("part-unsupported", problem, where="loss")
    prepared = prepare(
        recipe.data,
        tokenizer,
        seed=recipe.seed,
        kind=loss.data,
        given=objects.data,
        given_validation=objects.eval_data,
    )
    for dataset in (prepared.train, prepared.validation):
        if dataset is not None:
            check_room(dataset, recipe)
    return prepared


def check_room(dataset: TokenDataset, recipe: Recipe) -> None:
    """Raise `recipe-conflict` where an example is longer than a micro-batch."""
    longest = int(dataset.lengths.max())
    if longest > recipe.max_tokens_per_device:
        raise LuthierError(
            "recipe-conflict",
            f"the longest example has {longest} tokens and a micro-batch at most {recipe.max_tokens_per_device}",
            where="max_tokens_per_device",
            remedy=f"Raise it to {longest}, or lower data.max_length.",
        )


def check_fit(dataset: TokenDataset, tokenizer: Any, model: Any) -> None:
    """Raise where the model has no embedding for a token (`model-vocabulary`) or a position of the examples.

    Rotary positions have no end: beyond those that the model was trained on there is a warning only.
    """
    tokens = model.get_input_embeddings()
    check_vocabulary(dataset, tokenizer, tokens.weight.shape[0])
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(dataset.lengths.max())
    if not isinstance(known, int) or longest <= known:
        return
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    if any(known <= table.num_embeddings <= known + 2 for table in tables):  # OPT keeps two rows more than it counts
        problem = f"the longest example has {longest} tokens, and the model has {known} positions"
        raise LuthierError("recipe-conflict", problem, where="data.max_length", remedy=f"Set it to {known} or less.")
    log.warning("examples are longer than the model's positions", longest=longest, max_position_embeddings=known)


def total_steps(recipe: Recipe, order: Order, train: TokenDataset) -> int:
    """Optimizer steps until the first of max_steps, max_tokens or, without either, num_train_epochs."""
    by_epochs = math.ceil(order.steps_per_epoch * recipe.num_train_epochs)
    limits = [recipe.max_steps] if recipe.max_steps else []
    if recipe.max_tokens:
        limits.append(_steps_for_tokens(recipe.max_tokens, order, train))
    total = min(limits, default=by_epochs)
    if total < 1:
        raise LuthierError("recipe-out-of-range", "the run has no step", where="num_train_epochs",
                           found=recipe.num_train_epochs)  # fmt: skip
    return total


def _steps_for_tokens(limit: int, order: Order, train: TokenDataset) -> int:
    """The step after which `limit` supervised tokens are reached: the order is known, so this is exact."""
    counts = train.num_supervised
    per_epoch = int(counts.sum())
    whole = max((limit - 1) // per_epoch, 0)
    seen, first = whole * per_epoch, whole * order.steps_per_epoch
    for step, rows in order.steps(first + order.steps_per_epoch, first=first):
        seen += int(counts[rows].sum())
        if seen >= limit:
            return step + 1
    raise AssertionError("an epoch holds its own tokens")


def _model(recipe: Recipe, objects: Objects, quantizer: Any, device: torch.device) -> Any:
    if objects.model is None:
        model = load.model_of(recipe.model, device, quantizer.load_arguments())
    else:
        load.check_causal(objects.model)
        model = objects.model.to(device)
    return quantizer.apply(model)


def _attach(
    recipe: Recipe, model: Any, tokenizer: Any, built: dict[str, Any], prepared: Prepared, device: torch.device
) -> Setup:
    order = Order(size=len(prepared.train), batch=recipe.global_batch_size, seed=recipe.seed)
    rates = _rates(recipe, total_steps(recipe, order, prepared.train))
    before, numbers = attention.install(model), {}
    context = context_for(
        model,
        built["quantizer"],
        device=device,
        seed=recipe.seed,
        total_steps=len(rates),
        original=lambda layer: load.original_weight(recipe.model.name_or_path, model, layer),
        batches=lambda n: _first(prepared.train, n, recipe, device),
        log=numbers.__setitem__,
        packing=recipe.packing,
    )
    model = built["adapter"].attach(model, context).train()
    probe.check(model, packing=recipe.packing)
    optimizer = _optimizer(built)
    return Setup(
        **{"recipe": recipe, "model": model, "tokenizer": tokenizer, "context": context, "device": device},
        **{"adapter": built["adapter"], "loss": built["loss"], "quantizer": built["quantizer"]},
        **{"optimizer_part": built["optimizer"], "optimizer": optimizer, "rates": rates, "order": order},
        **{"train": prepared.train, "validation": prepared.validation, "report": prepared.report},
        **{"attention": before, "numbers": numbers},
        step=Step(model, built["adapter"], built["loss"], router_coefficient=_router(recipe, model)),
        decays=[g.get("weight_decay", 0.0) for g in optimizer.param_groups],
    )


def _rates(recipe: Recipe, total: int) -> list[float]:
    warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total)
    if warmup > total:
        log.warning("the warm-up is longer than the run", warmup_steps=warmup, steps=total)
    return schedule.rates(recipe.lr_scheduler_type, recipe.learning_rate, total, warmup, recipe.lr_scheduler_kwargs)


def _optimizer(built: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer over the adapter's groups, of which at least one must hold something."""
    groups = [g for g in built["adapter"].groups() if g.parameters]
    if not groups:
        raise LuthierError("train-nothing", "the adapter leaves no parameter to train", where="adapter")
    return built["optimizer"].build(groups)


def _first(train: TokenDataset, count: int, recipe: Recipe, device: torch.device) -> list[Any]:
    rows = np.arange(min(len(train), count * recipe.global_batch_size)).tolist()
    return list(batches(train, rows, recipe, device))[:count]


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
