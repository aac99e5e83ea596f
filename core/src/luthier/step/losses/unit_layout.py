"""The layout of a run's units: whether prompts are shared, and what the loss arranges."""

from __future__ import annotations

from typing import Any

from luthier.data.batches.example_feed import Feed
from luthier.data.batches.layout import LaidOutFeed, UnitLayout
from luthier.data.examples import TokenDataset
from luthier.data.stream.row_stream import Stream
from luthier.model.recurrent import separation_reason
from luthier.plugins.contracts.protocols import Loss
from luthier.recipe import Recipe
from luthier.runs.writing.decisions import Decisions

NAME = "shared_prompts"


def choose_layout(
    recipe: Recipe, loss: Loss, rows: TokenDataset | Stream, config: Any, model: Any, decisions: Decisions
) -> UnitLayout:
    """Return how the units of a run are laid out. `config` is the model's; `model` is None before it is loaded.

    Prompts are shared where units have several documents, unless the model's documents cannot share a pass.
    """
    known = rows.sample if isinstance(rows, Stream) else rows
    arrange = getattr(loss, "arrange", None)
    if arrange is not None and getattr(arrange, "__func__", None) is Loss.arrange:
        arrange = None  # the default leaves units unchanged
    shares = len(known.names) > 1 or arrange is not None
    if shares and config is not None:
        reason = separation_reason(config, model)
        because = "a prompt that several documents begin with is computed once" if reason is None else reason
        shares = decisions.take(NAME, lambda: (reason is None, because))
    return UnitLayout(max_length=recipe.data.max_length, arrange=arrange, shares_prompts=shares and config is not None)


def lay_out_feed(
    feed: Feed, recipe: Recipe, loss: Loss, rows: TokenDataset | Stream, model: Any, decisions: Decisions
) -> LaidOutFeed:
    """Return the feed with its portions laid out for a loaded model."""
    return LaidOutFeed(feed=feed, layout=choose_layout(recipe, loss, rows, model.config, model, decisions))
