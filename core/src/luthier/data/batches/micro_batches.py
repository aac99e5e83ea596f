"""Micro-batches: the examples of a step, packed and distributed to the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch

from luthier.data.batches.batch import Batch, collate_examples, make_idle_batch
from luthier.data.batches.packing import Packing
from luthier.data.examples import TokenExample


def rank_batches(examples: Sequence[TokenExample], packing: Packing, device: torch.device) -> Iterator[Batch]:
    """Yield this rank's micro-batches on the device: as many as every other rank has, idle ones included."""
    for bins in packing.spread(packing.sizes(examples)):
        yield _batch(examples, bins[packing.rank], device)


def deal_batches(
    examples: Sequence[TokenExample], packing: Packing, device: torch.device, limit: int | None = None
) -> Iterator[Batch]:
    """Yield this rank's share of the micro-batches that a single process would have, the first `limit` of them."""
    alone = attrs.evolve(packing, ranks=1, rank=0)
    turns = [bins[0] for bins in alone.spread(packing.sizes(examples))][:limit]
    for first in range(0, len(turns), packing.ranks):
        own = turns[first + packing.rank : first + packing.rank + 1]
        yield _batch(examples, own[0] if own else [], device)


def _batch(examples: Sequence[TokenExample], members: Sequence[int], device: torch.device) -> Batch:
    batch = collate_examples([examples[i] for i in members]) if members else make_idle_batch(examples[0])
    return batch.to(device)
