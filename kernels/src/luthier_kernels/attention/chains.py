"""Attention of documents that continue others, such as two answers to one prompt, by the form for plain documents.

Each chain, from a document that continues none to one that no other continues, becomes one plain document: what two
chains begin with is computed in both. That costs less than any form with a mask, unless many short documents continue
a long one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from luthier_kernels.attention.documents import attend_documents

MOST: Final = 2.5  # scores of the chains for each score of the documents: beyond, another form is faster


def attend_chains(
    query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], links: Sequence[int], scale: float
) -> Tensor | None:
    """Return the attention [T, heads, D]; None if the chains would cost too much.

    Queries are [T, heads, D], keys and values [T, key heads, D]; document d has the tokens starts[d] to starts[d + 1]
    and continues document links[d], or none if that is -1.
    """
    lengths = [last - first for first, last in zip(starts, starts[1:], strict=False)]
    chains = list(_chains(links))
    if _count_chain_scores(chains, lengths) > MOST * _count_scores(links, lengths):
        return None
    inputs = [_in_chains(tensor, lengths, chains) for tensor in (query, key, value)]
    ends = torch.tensor([0, *(sum(lengths[d] for d in chain) for chain in chains)]).cumsum(0)
    result = attend_documents(inputs[0], inputs[1], inputs[2], ends, scale)
    return _from_chains(result, lengths, chains)


def _chains(links: Sequence[int]) -> Iterator[list[int]]:
    """Yield the documents of each chain, in order."""
    for last in sorted(set(range(len(links))) - set(links)):
        chain = [last]
        while links[chain[0]] >= 0:
            chain.insert(0, links[chain[0]])
        yield chain


def _count_scores(links: Sequence[int], lengths: Sequence[int]) -> float:
    """Return how many scores the documents have if none is computed twice."""
    total, known = 0.0, [0] * len(links)
    for document, (link, length) in enumerate(zip(links, lengths, strict=True)):
        known[document] = 0 if link < 0 else known[link] + lengths[link]
        total += length * (known[document] + (length + 1) / 2)
    return total


def _count_chain_scores(chains: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    sizes = [sum(lengths[d] for d in chain) for chain in chains]
    return sum(size * (size + 1) / 2 for size in sizes)


def _in_chains(tensor: Tensor, lengths: Sequence[int], chains: Sequence[Sequence[int]]) -> Tensor:
    """Return the documents of [T, ...] in their chains, one chain after another."""
    documents = tensor.split(list(lengths))
    return torch.cat([documents[d] for chain in chains for d in chain])


def _from_chains(result: Tensor, lengths: Sequence[int], chains: Sequence[Sequence[int]]) -> Tensor:
    """Return each document of [T, ...] from the first chain that has it."""
    order = [document for chain in chains for document in chain]
    parts = result.split([lengths[document] for document in order])
    return torch.cat([parts[order.index(document)] for document in range(len(lengths))])
