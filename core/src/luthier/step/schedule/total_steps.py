"""The length of a run, as far as its rows decide it, and the learning rates over that length."""

from __future__ import annotations

import math

import attrs
import numpy as np

from luthier.data.batches.example_feed import Feed, RowFeed
from luthier.data.batches.row_order import Order, order_rows
from luthier.data.examples import TokenDataset
from luthier.data.stream.row_stream import Stream
from luthier.data.stream.stream_feed import StreamFeed
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.recipe import Recipe
from luthier.recipe.checks.modes import mode_of
from luthier.recipe.settled import SettledRecipe
from luthier.step.schedule.learning_rates import Rates, endless_rates, final_rate, schedule_rates

log = get_logger()


def check_length(recipe: Recipe) -> None:
    """Raise `recipe-conflict` before any work where a run whose length cannot be known has a schedule that needs it."""
    unending = mode_of(recipe) == "infinite"
    if unending and not (recipe.save_steps or recipe.save_samples or recipe.save_strategy in ("epoch", "no")):
        log.warning("a run without end writes its first checkpoint when it is stopped", remedy="save_steps")
    if unending or (recipe.data.streaming and not recipe.max_steps):
        # any rate shows whether the schedule is sound
        peak = 1.0 if recipe.learning_rate == "auto" else recipe.learning_rate
        _rates(recipe, peak, None)


def feed_of(recipe: SettledRecipe, train: TokenDataset | Stream) -> Feed:
    """Return where the loop gets the examples of each step from, and how many steps there are."""
    if isinstance(train, Stream):
        return StreamFeed(
            stream=train,
            batch=recipe.global_batch_size,
            seed=recipe.seed,
            buffer=recipe.data.shuffle_buffer,
            total=recipe.max_steps,
            epochs=recipe.num_train_epochs if mode_of(recipe) == "epoch" else math.inf,
            max_tokens=recipe.max_tokens,
        )
    order = Order(size=len(train), batch=recipe.global_batch_size, seed=recipe.seed)
    return _limited(RowFeed(dataset=train, order=order), recipe)


def _limited(feed: RowFeed, recipe: Recipe) -> RowFeed:
    """Return the feed with the limits that the training mode counts: steps, samples, or none."""
    mode, order = mode_of(recipe), feed.order
    if mode == "infinite":
        return feed
    if mode == "epoch":
        steps = math.ceil(order.steps_per_epoch * recipe.num_train_epochs)
        if steps < 1:
            raise LuthierError("recipe-out-of-range", "the run has no step", where="num_train_epochs",
                               found=recipe.num_train_epochs)  # fmt: skip
        return attrs.evolve(feed, goal=order.samples_after(steps))
    goal = _samples_for_tokens(recipe.max_tokens, order, feed.dataset) if recipe.max_tokens else None
    return attrs.evolve(feed, max_steps=recipe.max_steps or None, goal=goal)


def _samples_for_tokens(limit: int, order: Order, train: TokenDataset) -> int:
    """Return the number of samples that contain `limit` supervised tokens. It is exact, because the order is known."""
    counts = train.num_supervised
    whole, rest = divmod(max(limit - 1, 0), int(counts.sum()))
    reached = np.cumsum(counts[order_rows(order.size, order.seed, whole)])
    return whole * order.size + int(np.searchsorted(reached, rest, side="right")) + 1


def rates_of(recipe: SettledRecipe, total: int | None) -> Rates:
    """Return the learning rate of each step. Raises `recipe-conflict` for a schedule that needs an unknown length."""
    return _rates(recipe, recipe.learning_rate, total)


def _rates(recipe: Recipe, peak: float, total: int | None) -> Rates:
    name, settings = recipe.lr_scheduler_type, recipe.lr_scheduler_kwargs
    if total is None:
        if recipe.warmup_ratio:
            problem, remedy = "a share of a run of unknown length", "Set warmup_steps, or max_steps."
            raise LuthierError("recipe-conflict", problem, where="warmup_ratio", remedy=remedy)
        return Rates([], endless_rates(name, peak, recipe.warmup_steps, settings), peak=peak)
    warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total)
    if warmup > total:
        log.warning("the warm-up is longer than the run", warmup_steps=warmup, steps=total)
    rates = schedule_rates(name, peak, total, warmup, settings)
    return Rates(rates, end=final_rate(name, peak, total, warmup, settings))
