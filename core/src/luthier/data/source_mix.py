"""Mixing: the examples of an epoch, with each source's rows as often and as heavy as the recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import TokenDataset
from luthier.data.source_shares import SourceRows, count_rows, is_mixed


def weigh_sources(dataset: TokenDataset, parts: Sequence[SourceRows]) -> TokenDataset:
    """Return the examples with their weights multiplied by those of their sources."""
    if dataset.index is None or all(part.source.weight == 1.0 for part in parts):
        return dataset
    weights = dataset.weights.copy()
    for part in parts:
        weights[(dataset.index >= part.first) & (dataset.index < part.end)] *= part.source.weight
    return attrs.evolve(dataset, weights=weights)


def mix_sources(
    dataset: TokenDataset, parts: Sequence[SourceRows], seed: int
) -> tuple[TokenDataset, list[dict[str, Any]]]:
    """Return the examples of an epoch, and for each source how many rows it has, and how many of them come.

    A row that makes several examples comes with all of them. `seed` decides which rows of a source come, or come once
    more than others; their order stays.
    """
    index = np.arange(len(dataset)) if dataset.index is None else dataset.index
    rows = [np.unique(index[(index >= part.first) & (index < part.end)]) for part in parts]
    sources = [part.source for part in parts]
    wanted = count_rows(sources, [len(own) for own in rows])
    counted = [
        {"path": s.path, "rows": len(own), "repeat": s.repeat, "weight": s.weight, "epoch_rows": n,
         "share": n / max(sum(wanted), 1)}
        for s, own, n in zip(sources, rows, wanted, strict=True)
    ]  # fmt: skip
    if not is_mixed(sources):
        return dataset, counted
    times = np.zeros(max((part.end for part in parts), default=0) + 1, np.int64)
    for number, (own, count) in enumerate(zip(rows, wanted, strict=True)):
        times[own] = _times(len(own), count, np.random.default_rng([seed, number]))
    chosen = np.repeat(np.arange(len(dataset)), times[index])
    return TokenDataset.of([dataset[i] for i in chosen.tolist()]), counted


def _times(rows: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each of `rows` rows comes so that `count` come in all: equally often, or once more."""
    if not rows:
        return np.zeros(0, np.int64)
    whole, more = divmod(count, rows)
    times = np.full(rows, whole, np.int64)
    times[random.permutation(rows)[:more]] += 1
    return times
