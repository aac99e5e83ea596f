"""Fitting: how many tokens of a micro-batch a device takes, and the refusal of a run that it cannot take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from luthier.data.batches.packing import Packing
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.stream.row_stream import sampled_rows
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.memory.bound import surely_fits
from luthier.memory.case import OPTION, SUGGESTED, Case, Turns
from luthier.memory.counts import parameters_of
from luthier.memory.dry_run import Footprint, Unknown
from luthier.memory.suggestions import Hardware, Suggestion, Task, suggest_values
from luthier.model import load
from luthier.plugins.contracts.protocols import Adapter
from luthier.recipe.reading.draft import default_of
from luthier.recipe.settled import SettledRecipe
from luthier.runs.writing.decisions import Decisions
from luthier.sizes import size_text

if TYPE_CHECKING:
    from luthier.data.batches.layout import LaidOutFeed
    from luthier.data.stream.row_stream import Stream

log = get_logger()
SHARE: Final = {"cuda": 0.9}  # the share of free memory that `auto` plans for; freed blocks leave the rest fragmented
OTHERWISE: Final = 0.7  # the share on a CPU, where other programs need memory too
USEFUL: Final = {"cpu": 2048, "cuda": 32768}  # tokens of a micro-batch beyond which a device gets no faster
GRAIN: Final = 64  # `auto` gives a multiple of this
STEPS: Final = 64  # steps that are searched for the fullest micro-batch
ROWS: Final = 256  # rows that stand for all when a micro-batch is filled
FALLBACK: Final = 4096


def settle_sizes(case: Case, decisions: Decisions, world: World | None = None) -> SettledRecipe:
    """Return the recipe with a number in the place of each `auto`. Raises `memory-too-small` where it cannot fit."""
    world = world or World()
    if case.objects.model is not None:
        load.check_causal(case.objects.model)
    case = suggest_numbers(case, decisions, world.size)
    if case.tokens is None:
        tokens = decisions.take(OPTION, lambda: choose_tokens(case))
        case.numbers[OPTION] = max(tokens, case.longest)
    elif case.recipe.memory_check:
        world.decide(lambda: check(case))
    return case.settle()


def suggest_numbers(case: Case, decisions: Decisions, ranks: int = 1) -> Case:
    """Return the case with the batch and the rate that hardware, model and rows suggest, where these are `auto`."""
    still = [name for name in SUGGESTED if getattr(case.recipe, name) == "auto"]
    values = {name: decisions.take(name, functools.partial(_suggestion, case, name, ranks)) for name in still}
    return attrs.evolve(case, numbers={**case.numbers, **values}) if values else case


def list_suggestions(case: Case, model: Any, adapter: Adapter, ranks: int = 1) -> list[Suggestion]:
    """Return what `suggest_values` says of this run."""
    counts = parameters_of(model, adapter)["all"]
    examples = len(case.prepared.train) if isinstance(case.prepared.train, TokenDataset) else None
    task = Task(parameters=counts["total"], trainable=counts["trainable"], examples=examples)
    return suggest_values(Hardware(kind=case.device.type, memory=case.room.total, ranks=ranks), task)


def _suggestion(case: Case, option: str, ranks: int) -> tuple[Any, str]:
    try:
        setup = case.rehearsal.setup
        suggestions = list_suggestions(case, setup.model, setup.adapter, ranks)
    except Unknown as error:
        return default_of(option), f"the default, as the model cannot be counted before it is loaded ({error})"
    return next((s.value, s.reason) for s in suggestions if s.option == option)


def choose_tokens(case: Case) -> tuple[int, str]:
    """Return what `auto` stands for, and why. Raises `memory-too-small` where not even the longest example fits."""
    if not case.packing:
        return case.longest, "the longest example, as each is alone in its micro-batch"
    try:
        return _fitting(case)
    except Unknown as error:
        return max(case.longest, FALLBACK), f"memory cannot be predicted before the model is loaded ({error})"


def _fitting(case: Case) -> tuple[int, str]:
    setup = case.rehearsal.setup
    longest = case.longest + _prompted(setup.packing, setup.train)
    lengths = setup.layout.unit_tokens(sampled_rows(setup.train)) + _prompted(setup.packing, setup.train)
    whole = isinstance(setup.train, TokenDataset)
    most = _most(lengths, setup.recipe.global_batch_size, setup.packing.ranks, whole=whole)
    rows = setup.feed.head(ROWS)
    useful = USEFUL.get(case.device.type, FALLBACK)
    high, free = max(longest, min(useful, most)), case.room.free

    @functools.cache
    def tried(tokens: int) -> Footprint:
        return case.footprint([filled(rows, tokens, setup.packing)] * (1 if tokens >= most else 2))

    share = SHARE.get(case.device.type, OTHERWISE)
    tokens_found = largest(lambda tokens: tried(tokens).peak, longest, high, int(share * free))
    if tokens_found is None:
        raise too_small(case, tried(longest))
    reason = f"{size_text(tried(tokens_found).peak)} of {size_text(free)} free"
    if tokens_found < high:
        return tokens_found, f"the most that fits: {reason}"
    why = "the longest step has no more" if high == most else f"more would be no faster on {case.device.type}"
    return tokens_found, f"{why if high > longest else 'the longest example'}; it takes {reason}"


def check(case: Case) -> None:
    """Raise `memory-too-small` where the run's fullest micro-batch is predicted not to fit."""
    if surely_fits(case.recipe, case.objects.model, case.tokens or 0, case.longest, case.room.free):
        return
    try:
        setup = case.rehearsal.setup
        footprint = case.footprint(fullest_batches(setup.feed, setup.packing, setup.train))
    except Unknown as error:
        log.warning("memory not predicted", reason=str(error))
        return
    if footprint.peak > case.room.free:
        raise too_small(case, footprint)


def too_small(case: Case, footprint: Footprint) -> LuthierError:
    """Return the error that refuses the run, with its numbers and what would help."""
    room, causes = case.room, footprint.causes
    shares = ", ".join(f"{cause} {size_text(size)}" for cause, size in causes.items() if size > footprint.peak // 100)
    problem = (
        f"a micro-batch of {footprint.tokens:,} tokens needs {size_text(footprint.peak)} ({shares}), and "
        f"{size_text(room.free)} are free on {room.device}, limited by {room.bound}"
    )
    remedy = f"Try {' or '.join(remedies(case, footprint))}; memory_check: false starts it all the same."
    return LuthierError("memory-too-small", problem, where="device", remedy=remedy)


def remedies(case: Case, footprint: Footprint) -> list[str]:
    """Settings that make the largest causes smaller, the largest first."""
    recipe, longest = case.recipe, case.longest
    fewer = case.packing and footprint.tokens > longest
    per_token = [f"{OPTION}: {longest}"] if fewer else [f"a data.max_length below {longest}"]
    checkpointed = [] if recipe.gradient_checkpointing else ["gradient_checkpointing: true"]
    trained = ["an adapter that trains fewer weights, such as lora"]
    known = {
        "weights": ["model.dtype: bfloat16"] if recipe.model.dtype in ("float32", "float64") else ["a smaller model"],
        "gradients": trained,
        "optimizer": trained,
        "activations": [*checkpointed, *per_token],
        "head": per_token,
    }
    ranked = sorted(known, key=lambda cause: -footprint.causes[cause])
    needed = [cause for cause in ranked if footprint.causes[cause] > footprint.peak // 10]
    return list(dict.fromkeys(text for cause in needed for text in known[cause]))


def fullest_batches(feed: LaidOutFeed, packing: Packing, train: TokenDataset | Stream, steps: int = STEPS) -> Turns:
    """Return the two largest micro-batches of the step, of the first `steps`, that has the largest.

    Of a stream they are filled, as its steps may come to be.
    """
    if not isinstance(train, TokenDataset):
        return [filled(feed.head(ROWS), packing.max_tokens, packing)] * 2
    best: Turns = []
    size: list[tuple[int, int]] = []
    for portion in islice(feed.portions(0), steps):
        lengths = packing.sizes(portion.examples)
        turns = [own for bins in packing.spread(lengths) for own in bins[:1]]
        sizes = [(sum(lengths[i] for i in own), sum(lengths[i] ** 2 for i in own)) for own in turns]
        first = sorted(range(len(turns)), key=lambda t: sizes[t], reverse=True)[:2]
        if [sizes[t] for t in first] > size:
            best, size = [[portion.examples[i] for i in turns[t]] for t in first], [sizes[t] for t in first]
    return best


def filled(rows: Sequence[TokenExample], tokens: int, packing: Packing) -> list[TokenExample]:
    """Return the longest row, and then the rows as they come, again and again, up to `tokens` tokens."""
    sizes = packing.sizes(rows)
    first = max(range(len(rows)), key=sizes.__getitem__)
    filling, left = [rows[first]], tokens - sizes[first]
    for row, size in cycle(zip(rows, sizes, strict=True)):
        if size > left:
            return filling
        filling.append(row)
        left -= size
    raise AssertionError("rows have tokens")


def largest(peak: Callable[[int], int], low: int, high: int, budget: int) -> int | None:
    """Return the most tokens, nearly, from `low` to `high` whose peak is within the budget; None where `low` is not.

    The peak grows with the tokens about linearly, so the line through the ends is followed, and in between the middle
    is tried, which ends it for any other shape too.
    """
    least, most = peak(low), peak(high)
    if least > budget:
        return None
    if most <= budget:
        return high
    for straight in cycle((True, False)):
        if high - low <= max(GRAIN, low // 32):
            break
        step = (high - low) * (budget - least) // (most - least) if straight else (high - low) // 2
        round_ = (low + step) // GRAIN * GRAIN
        tokens = min(max(round_ if round_ > low else low + step, low + 1), high - 1)
        bytes_needed = peak(tokens)
        if bytes_needed > budget:
            high, most = tokens, bytes_needed
            continue
        low, least = tokens, bytes_needed
        if budget - bytes_needed < budget // 50:
            break
    return low


def _most(lengths: Any, count: int, ranks: int, *, whole: bool) -> int:
    """Return the tokens of the longest step of `count` units that there could be, as its ranks share them.

    `whole` says that these are the lengths of all rows, and not of a stream's first ones.
    """
    longest = int(np.sort(lengths)[-count:].sum()) if whole else lengths.max() * count
    return -(-int(longest) // ranks)


def _prompted(packing: Packing, train: TokenDataset | Stream) -> int:
    """Return the tokens that the adapter puts before the documents of one unit, at most."""
    return packing.virtual_tokens * max(len(sampled_rows(train).names), 1)
