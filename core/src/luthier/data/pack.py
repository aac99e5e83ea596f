"""Packing: which examples share a micro-batch, balanced and under a token limit."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

TRIES: Final = 4  # numbers of bins for which balance is tried before the fallback's own number


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices, each at most `max_tokens` long, every index once; deterministic.

    Longest-processing-time over the fewest bins for which it respects the limit, else best-fit decreasing: balanced
    where possible, and never more bins than the latter. A length above `max_tokens` is the caller's error.
    """
    assert all(0 < length <= max_tokens for length in lengths), "an example is longer than a micro-batch"
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fallback = _best_fit(lengths, order, max_tokens)
    fewest = max(-(-sum(lengths) // max_tokens), 1)
    for count in (*range(fewest, min(fewest + TRIES, len(fallback))), len(fallback)):
        bins = _longest_first(lengths, order, count, max_tokens)
        if bins:
            return bins
    return fallback


def _longest_first(lengths: Sequence[int], order: list[int], count: int, max_tokens: int) -> list[list[int]]:
    """Each example to the least loaded of `count` bins; empty where one overflows."""
    heap = [(0, i) for i in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for index in order:
        load, chosen = heap[0]
        if load + lengths[index] > max_tokens:
            return []
        bins[chosen].append(index)
        heapq.heapreplace(heap, (load + lengths[index], chosen))
    return [b for b in bins if b]


def _best_fit(lengths: Sequence[int], order: list[int], max_tokens: int) -> list[list[int]]:
    """Each example to the fullest bin that takes it."""
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: list[list[int]] = []
    for index in order:
        at = bisect_left(room, (lengths[index], -1))
        if at == len(room):
            bins.append([])
            free, chosen = max_tokens, len(bins) - 1
        else:
            free, chosen = room.pop(at)
        bins[chosen].append(index)
        insort(room, (free - lengths[index], chosen))
    return bins
