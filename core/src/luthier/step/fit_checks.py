"""Checks of a run's rows against its model and its micro-batch."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import torch

from luthier.data.batches.layout import UnitLayout
from luthier.data.batches.packing import Packing
from luthier.data.examples import TokenDataset
from luthier.data.prepare import Prepared, check_token_ids
from luthier.data.stream.row_stream import Stream
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.generation.generate import teach_stops
from luthier.recipe.schema import Data
from luthier.recipe.settled import SettledRecipe

if TYPE_CHECKING:
    from luthier.step.setup import Setup

FIRST_STEPS: Final = 10_000  # the most steps of which a quantizer is asked how many tokens they need
COUNTED: Final = 100  # the most steps whose tokens are counted
log = get_logger()


def prepare_model(model: Any, tokenizer: Any, prepared: Prepared) -> None:
    """Tell the model where answers stop, and check that it knows every token and position of the rows."""
    teach_stops(model, tokenizer, prepared.stop_tokens)
    for dataset in (prepared.train, prepared.validation):
        if dataset is not None:
            check_fit(dataset, tokenizer, model)


def check_rooms(prepared: Prepared, data: Data, most: int | None, layout: UnitLayout) -> None:
    """Raise `recipe-conflict` where a unit of either set is longer than a micro-batch of `most` tokens.

    None: that number is still to be chosen, and will be at least the longest unit.
    """
    for dataset in (prepared.train, prepared.validation):
        if dataset is not None and most is not None:
            check_room(dataset, data, most, layout)


def check_room(dataset: TokenDataset | Stream, data: Data, most: int, layout: UnitLayout) -> None:
    """Raise `recipe-conflict` where a unit is longer than a micro-batch of `most` tokens."""
    longest = layout.longest_unit(dataset)
    if longest > most:
        option = "data.max_length" if data.block_size is None else "data.block_size"
        problem = f"the longest example {_has(dataset)} {longest} tokens and a micro-batch at most {most}"
        remedy = f"Raise it to {longest}, or lower {option}."
        raise LuthierError("recipe-conflict", problem, where="max_tokens_per_device", remedy=remedy)


def check_prompts(prepared: Prepared, recipe: SettledRecipe, packing: Packing, model: Any) -> None:
    """Raise `recipe-conflict` where an example with what the adapter puts before it is longer than may be."""
    added = packing.virtual_tokens
    for dataset in (prepared.train, prepared.validation) if added else ():
        if dataset is None:
            continue
        _check_positions(dataset, model, added)
        longest = dataset.longest + added
        if packing.on and longest > recipe.max_tokens_per_device:
            length_note = f"the longest example {_has(dataset)} {longest} tokens, {added} of them the adapter's"
            problem = f"{length_note}, and a micro-batch at most {recipe.max_tokens_per_device}"
            raise LuthierError("recipe-conflict", problem, where="max_tokens_per_device",
                               remedy=f"Raise it to {longest}, or lower data.max_length.")  # fmt: skip


def check_tokens(setup: Setup) -> None:
    """Raise `recipe-conflict` if the first micro-batch of a step, its largest, has too few tokens for the quantizer.

    Of a stream only the first step is looked at, as its later rows are not known before they are read.
    """
    known = FIRST_STEPS if isinstance(setup.train, TokenDataset) else 1
    total = known if setup.feed.total is None else min(setup.feed.total, known)
    needs = ((step, *need) for step in range(total) for need in setup.quantizer.needed_tokens(step).items())
    counted = [(_count_tokens(setup, step), step, option, needed) for step, option, needed in islice(needs, COUNTED)]
    short = [counts for counts in counted if counts[0] < counts[-1]]
    if short:
        count, step, option, needed = min(short)
        problem = f"{needed} tokens are needed, and the largest micro-batch of step {step + 1} has {count}"
        remedy = f"Set it to {count} or less, or raise global_batch_size and max_tokens_per_device."
        raise LuthierError("recipe-conflict", problem, where=f"quantizer.{option}", remedy=remedy)


def _count_tokens(setup: Setup, step: int) -> int:
    """Return the tokens of the first micro-batch of a step on this rank."""
    lengths = setup.packing.sizes(next(iter(setup.feed.portions(step))).examples)
    return sum(lengths[i] for i in setup.packing.spread(lengths)[0][setup.packing.rank])


def _has(dataset: TokenDataset | Stream) -> str:
    """Return the verb for what an example has. A stream's examples are not known: they only may have it."""
    return "may have" if isinstance(dataset, Stream) else "has"


def check_fit(dataset: TokenDataset | Stream, tokenizer: Any, model: Any) -> None:
    """Raise where the model has no embedding for a token (`model-vocabulary`) or a position of the examples.

    Rotary positions have no end: beyond those that the model was trained on there is a warning only.
    """
    tokens = model.get_input_embeddings()
    size = tokens.weight.shape[0]
    dataset.check(lambda part: check_token_ids(part, tokenizer, size))
    _check_positions(dataset, model)


def _check_positions(dataset: TokenDataset | Stream, model: Any, added: int = 0) -> None:
    """Raise or warn where documents have more positions than the model; `added` are those of an adapter's prompt."""
    tokens = model.get_input_embeddings()
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = dataset.longest_document + added
    if not isinstance(known, int) or longest <= known:
        return
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens]
    # OPT has two rows more than its config counts
    if any(known <= table.num_embeddings <= known + 2 for table in tables):
        own = f", {added} of them the adapter's" if added else ""
        problem = f"the longest document {_has(dataset)} {longest} tokens{own}, and the model has {known} positions"
        remedy = f"Set it to {known - added} or less."
        raise LuthierError("recipe-conflict", problem, where="data.max_length", remedy=remedy)
    longest = dataset.sample.longest_document + added if isinstance(dataset, Stream) else longest
    if longest > known:
        log.warning("documents are longer than the model's positions", longest=longest, max_position_embeddings=known)
