"""Earlier rows: a share of the tasks before, which comes again in a later task."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from luthier.data.examples import TokenDataset
from luthier.data.stream.row_stream import Stream
from luthier.logs import get_logger
from luthier.training.continual.tasks import stream_conflict

log = get_logger()


def add_earlier(
    own: TokenDataset | Stream, before: Sequence[TokenDataset | Stream], share: float, seed: int
) -> TokenDataset:
    """Return a task's training examples, and after them `share` as many of the tasks before, drawn by `seed`.

    Each task before gives equally many, or all that it has. Their held-out rows are in none of these sets.
    """
    if not isinstance(own, TokenDataset):
        raise stream_conflict()
    sets, first = [own], 1 + (int(own.index.max()) if own.index is not None and len(own) else -1)
    for number, (dataset, wanted) in enumerate(zip(before, _divide(round(share * len(own)), len(before)), strict=True)):
        if not isinstance(dataset, TokenDataset):
            raise stream_conflict()
        order = np.random.default_rng([seed, len(before), number]).permutation(len(dataset))
        drawn = TokenDataset.of([dataset[i] for i in sorted(order[:wanted].tolist())])
        if drawn.index is not None and len(drawn):
            # rows are told apart by their number, and each file counts its rows from 0
            index = drawn.index + first
            drawn, first = attrs.evolve(drawn, index=index), int(index.max()) + 1
        sets.append(drawn)
    log.info("earlier tasks are trained on again", own=len(own), earlier=[len(drawn) for drawn in sets[1:]])
    return TokenDataset.joined(sets)


def _divide(count: int, parts: int) -> list[int]:
    """Return `count` in parts that differ by one at most."""
    return [count // parts + (number < count % parts) for number in range(parts)]
