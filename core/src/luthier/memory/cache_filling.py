"""The filling of caches, rehearsed: passes of the reference or the teacher over all rows, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs

from luthier.data.batches.batch import Batch, collate_examples
from luthier.step.over_batches import run_over
from luthier.step.reference.cached_reference import AT_ONCE, cached_rows
from luthier.step.reference.company import find_caches

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.examples import TokenDataset, TokenExample
    from luthier.model.policy import ModelPolicy
    from luthier.step.reference.cached_reference import CachedReference
    from luthier.step.setup import Setup

SURVEYED: Final = 2048  # rows of which the fullest micro-batch is searched
NUMBER: Final = 4  # bytes of a kept value


def kept_bytes(setup: Setup) -> dict[str, int]:
    """Return the bytes that full caches take of a CPU's memory, by role; of another device's they take none."""
    if setup.device.type != "cpu":
        return {}
    caches = find_caches(setup)
    supervised = sum(int(rows.num_supervised.sum()) for rows in cached_rows(setup)) if caches else 0
    return {role: supervised * cache.width * NUMBER for role, cache in caches.items()}


def fill_once(setup: Setup, turn: Sequence[TokenExample]) -> int:
    """Run each cache's pass over the largest micro-batch, while the others made with it are held; return its tokens.

    `turn` is the largest micro-batch of a step. The passes have a larger one where all rows fill it better.
    """
    largest, count = turn, 1
    for rows in cached_rows(setup):
        own, number = _fullest(rows, setup)
        count = max(count, min(number, AT_ONCE))
        largest = max(largest, own, key=lambda examples: sum(setup.packing.sizes(examples)))
    batches = [collate_examples(largest).to(setup.device) for _ in range(count)]
    for cache in find_caches(setup).values():

        def ask(policy: ModelPolicy, batch: Batch, asked: CachedReference = cache) -> Tensor:
            return asked.live_values(policy, batch)[batch.supervised]

        run_over(setup, batches[:1], ask)
    return sum(setup.packing.sizes(largest))


def _fullest(rows: TokenDataset, setup: Setup) -> tuple[list[TokenExample], int]:
    """Return the micro-batch with the most tokens, of the passes over the first rows, and how many these rows make."""
    alone = attrs.evolve(setup.packing, ranks=1, rank=0)
    examples = [rows[number] for number in range(min(len(rows), SURVEYED))]
    sizes = alone.sizes(examples)
    turns = [bins[0] for bins in alone.spread(sizes)]
    members = max(turns, key=lambda own: (sum(sizes[i] for i in own), sum(sizes[i] ** 2 for i in own)))
    return [examples[i] for i in members], len(turns)
