"""Packing: which examples share a micro-batch on which rank, balanced and within a token limit."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from luthier.data.examples import TokenExample

TRIES: Final = 4  # numbers of micro-batches that are tried for balance before the fallback's own number

Bins = list[list[int]]  # the indices of the examples in each bin


@attrs.frozen(kw_only=True)
class Packing:
    """The rule for making a step's micro-batches: at most `max_tokens` each, or one unit each if not `on`."""

    max_tokens: int
    on: bool = True
    ranks: int = 1
    rank: int = 0  # this process's own
    virtual_tokens: int = 0  # tokens that an adapter puts before each document that continues none

    def sizes(self, examples: Sequence[TokenExample]) -> list[int]:
        """Return the number of tokens that each unit computes."""
        own = [len(example.input_ids) for example in examples]
        if not self.virtual_tokens:
            return own
        return [n + self.virtual_tokens * len(e.heads) for n, e in zip(own, examples, strict=True)]

    def for_rank(self, rank: int, ranks: int, virtual_tokens: int) -> Packing:
        """Return the same packing for one of several ranks, with an adapter's virtual tokens counted."""
        return attrs.evolve(self, rank=rank, ranks=ranks, virtual_tokens=virtual_tokens)

    def spread(self, lengths: Sequence[int]) -> list[Bins]:
        """Return the micro-batches, each with one bin for each rank. An empty bin is a rank's idle turn.

        An example above the limit, which may have been lowered after memory ran out, is alone in its bin.
        """
        if self.on:
            return pack_ranks(lengths, max(self.max_tokens, *lengths, 1), self.ranks)
        alone = [[i] for i in longest_first(lengths)] if self.ranks > 1 else [[i] for i in range(len(lengths))]
        return _grouped(alone, self.ranks)


def pack_ranks(lengths: Sequence[int], max_tokens: int, ranks: int, groups: Sequence[int] | None = None) -> list[Bins]:
    """Return micro-batches, each one bin of indices for each of `ranks`: every index once, no bin above `max_tokens`
    tokens.

    Every rank has the same number of micro-batches, the smallest that longest-processing-time or best-fit decreasing
    finds over all bins together. Bins are sorted by load before they are dealt, so that the ranks of one micro-batch
    have about as much to do; a rank without work has an empty bin. The result is deterministic.

    `groups` gives each length the group that it belongs to (the two answers of a preference pair, say): a group is
    never split. It is the caller's error if a group, or a length outside of groups, is above `max_tokens`.
    """
    if groups is not None:
        members = _members(groups)
        whole = pack_ranks([sum(lengths[i] for i in own) for own in members], max_tokens, ranks)
        return [[[i for unit in bin_ for i in members[unit]] for bin_ in bins] for bins in whole]
    assert all(0 < length <= max_tokens for length in lengths), "an example is longer than a micro-batch"
    order = longest_first(lengths)
    fallback = _best_fit(lengths, order, max_tokens)
    enough = -(-len(fallback) // ranks)
    fewest = -(-sum(lengths) // (max_tokens * ranks))
    for count in (*range(fewest, min(fewest + TRIES, enough)), enough):
        bins = _least_loaded(lengths, order, count * ranks, max_tokens)
        if bins:
            return _dealt(bins, lengths, ranks)
    return _dealt(fallback, lengths, ranks)


def pack(lengths: Sequence[int], max_tokens: int) -> Bins:
    """Return the bins of one rank, the fullest first."""
    return [bins[0] for bins in pack_ranks(lengths, max_tokens, 1)]


def measure_imbalance(lengths: Sequence[int], micro_batches: Sequence[Bins]) -> float:
    """Return the time of the slowest rank in each micro-batch, relative to equal loads, added up; 1 is perfect.

    Loads are tokens; ranks wait for each other in every micro-batch.
    """
    loads = [[sum(lengths[i] for i in bin_) for bin_ in bins] for bins in micro_batches]
    total = sum(map(sum, loads))
    return sum(max(own) for own in loads) * len(loads[0]) / total if total else 1.0


def longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _members(groups: Sequence[int]) -> Bins:
    """Return the indices of each group, with groups in the order of their first member."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return list(members.values())


def _dealt(bins: Bins, lengths: Sequence[int], ranks: int) -> list[Bins]:
    loads = [sum(lengths[i] for i in bin_) for bin_ in bins]
    return _grouped([bins[i] for i in longest_first(loads)], ranks)


def _grouped(bins: Bins, ranks: int) -> list[Bins]:
    """Return consecutive bins as the ranks of one micro-batch, the last micro-batch filled up with empty bins."""
    groups = [bins[start : start + ranks] for start in range(0, len(bins), ranks)]
    return [group + [[] for _ in range(ranks - len(group))] for group in groups]


def _least_loaded(lengths: Sequence[int], order: list[int], count: int, max_tokens: int) -> Bins:
    """Put each example into the least loaded of `count` bins (LPT, Graham 1969). Return [] if one overflows."""
    heap = [(0, i) for i in range(count)]
    bins: Bins = [[] for _ in range(count)]
    for index in order:
        load, chosen = heap[0]
        if load + lengths[index] > max_tokens:
            return []
        bins[chosen].append(index)
        heapq.heapreplace(heap, (load + lengths[index], chosen))
    return [b for b in bins if b]


def _best_fit(lengths: Sequence[int], order: list[int], max_tokens: int) -> Bins:
    """Put each example into the fullest bin that has room for it (best-fit decreasing)."""
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    bins: Bins = []
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
