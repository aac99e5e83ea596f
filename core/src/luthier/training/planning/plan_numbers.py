"""Survey: how many steps a run has and how full its micro-batches are, without training; for the plan."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

import attrs

from luthier.data.batches.shared_prompts import saved_by_unit
from luthier.data.examples import TokenDataset
from luthier.step.setup import Setup

STEPS: Final = 1000  # the most steps whose packing is surveyed
STREAMED: Final = 50  # the most steps of a stream, which is read for the survey


def schedule_of(setup: Setup) -> dict[str, Any]:
    """Steps, epochs and tokens; None for what is not known before the rows were read, or has no end."""
    feed, train, total = setup.feed, setup.train, setup.feed.total
    tokens, saved = _tokens_of_epoch(setup)
    known = train if isinstance(train, TokenDataset) else None
    return {
        "examples": None if known is None else len(known),
        "steps_per_epoch": feed.steps_per_epoch,
        "total_steps": total,
        "epochs": total / feed.steps_per_epoch if total and feed.steps_per_epoch else None,
        "tokens_per_epoch": tokens,
        "tokens_saved_per_epoch": saved,
        "supervised_tokens_per_epoch": None if known is None else int(known.num_supervised.sum()),
        "validation_examples": len(setup.validation) if setup.validation is not None else 0,
        "peak_learning_rate": setup.rates.peak,
    }


def _tokens_of_epoch(setup: Setup) -> tuple[int | None, int | None]:
    """Return the tokens that one epoch computes, and those that shared prompts save of it; None of a stream."""
    train, layout, size = setup.train, setup.layout, setup.recipe.global_batch_size
    if not isinstance(train, TokenDataset):
        return None, None
    if layout.arrange is None:
        saved = int(saved_by_unit(train).sum()) if layout.shares_prompts else 0
        return int(train.lengths.sum()) - saved + _prompted(setup, train), saved
    apart, laid = attrs.evolve(layout, shares_prompts=False), layout.lay_out_groups(train, size)
    whole, tokens = (sum(setup.packing.sizes(units)) for units in (apart.lay_out_groups(train, size), laid))
    return tokens, whole - tokens


def _prompted(setup: Setup, train: TokenDataset) -> int:
    """Return the tokens that the adapter puts before the documents of one epoch."""
    alone = train.documents is None or setup.layout.shares_prompts
    return setup.packing.virtual_tokens * (len(train) if alone or train.documents is None else len(train.documents))


def packing_of(setup: Setup) -> dict[str, float]:
    """Return how full the micro-batches of one epoch would be, or of its first steps."""
    packing, loads, examples, steps = setup.packing, [], 0, 0
    for portion in islice(setup.feed.portions(0), STEPS if isinstance(setup.train, TokenDataset) else STREAMED):
        lengths = packing.sizes(portion.examples)
        loads += [[sum(lengths[i] for i in own) for own in bins] for bins in packing.spread(lengths)]
        examples, steps = examples + len(lengths), steps + 1
        if portion.ends_epoch:
            break
    largest, tokens = max(map(max, loads)), sum(map(sum, loads))
    return {
        "max_tokens_per_device": packing.max_tokens,
        "micro_batches_per_step": len(loads) / steps,
        "documents_per_micro_batch": examples / (len(loads) * packing.ranks),
        "largest_micro_batch": largest,
        "efficiency": tokens / (len(loads) * packing.ranks * largest),
        "rank_imbalance": sum(map(max, loads)) * packing.ranks / tokens,
    }
