"""Pace: which step of its schedule a run is at, also after steps that moved nothing and with another batch."""

from __future__ import annotations

import attrs

from luthier.data.batches.example_feed import Reached, RowFeed
from luthier.data.batches.row_order import Order
from luthier.data.examples import TokenDataset
from luthier.data.stream.row_stream import Stream
from luthier.recipe.settled import SettledRecipe
from luthier.step.schedule.learning_rates import Rates
from luthier.step.schedule.total_steps import feed_of, rates_of


@attrs.define(kw_only=True)
class Pace:
    """Where a run stands in its schedule.

    The schedule's steps are those of the run. Where its samples are taken in another batch than it began with, they are
    those that this batch would have made of the same samples: `order` counts them. `held` of them moved no weight.
    """

    order: Order | None = None
    held: float = 0.0

    def place(self, step: int, samples: int) -> float:
        """Return the place in the schedule of the step after `step` steps and `samples` samples, counted from 0."""
        return (step if self.order is None else self.order.count_steps(samples)) - self.held


def resume_pace(
    recipe: SettledRecipe, train: TokenDataset | Stream, reached: Reached, rest: float
) -> tuple[Pace, Rates | None]:
    """Return the pace of a run that goes on, and its rates where they are those of the batch that it began with.

    A length in steps counts steps, and so does one that is not known.
    """
    feed = feed_of(recipe, train)
    if not isinstance(feed, RowFeed) or feed.goal is None or feed.max_steps is not None:
        return Pace(held=rest), None
    batch = reached.batch or feed.order.batch
    if batch == feed.order.batch and feed.order.samples_after(reached.step) == reached.samples:
        return Pace(held=rest), None
    begun = attrs.evolve(feed.order, batch=batch)
    rates = rates_of(recipe, begun.steps_between(0, feed.goal))
    return Pace(order=begun, held=rest), rates
