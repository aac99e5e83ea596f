"""The divergence of two models' attention relations: those of each token's query, key and value to earlier tokens'.

MiniLMv2 (Wang et al. 2020, arXiv 2012.15828): relations are the softmax of scaled products of queries with queries,
keys with keys and values with values, over relation heads into which the attention heads are regrouped. There they
relate all tokens of an encoder; in a decoder a token is related to itself and those before it, as attention sees them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final

import attrs
import torch
from luthier import Batch, LuthierError, Policy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier_distill import Distill
from luthier_distill.hidden_states import widen

Inputs = tuple[Tensor, Tensor, Tensor]  # queries [T, heads, d], keys [T, key-value heads, d], values likewise
Sides = tuple[Tensor, Tensor]  # [T, relation heads, d'] each: what a relation multiplies

BLOCK: Final = 1 << 22  # related pairs, over all heads, that exist at a time: 16 MiB in float32


@attrs.frozen(kw_only=True, eq=False)
class Rows:
    """Tokens of one document, whose relations to its tokens, and to those that it continues, are computed at once."""

    tokens: Tensor  # [S] places in the batch
    weights: Tensor  # [S]
    columns: Tensor  # [L] places in the batch: what the document continues, and its own tokens up to the last one
    related: Tensor  # [S, L]: True where the column is the row's token or one before it


def sum_attention(options: Distill, policy: Policy, batch: Batch) -> Tensor:
    """Return the weighted sum over supervised tokens of the divergence of the relations of the token that predicts it.

    The divergence is KL(teacher || model), averaged over relation heads and compared layers, and summed over the kinds
    of relations. The teacher's has no gradient.
    """
    own_layers, their_layers = options.related_layers
    own = _inputs(policy, batch, own_layers, "attention_layers")
    theirs = _inputs(policy.teacher(), batch, their_layers, "teacher_attention_layers")
    total = torch.stack([tensor.sum() * 0 for tensor in own[0]]).sum()
    for mine, other in zip(own, theirs, strict=True):
        heads = count_heads(options.relation_heads, mine, other)
        for kind in options.compared_relations:
            pair = RELATED[kind](mine, heads), RELATED[kind](other, heads)
            total = total + _sum_divergence(*pair, batch) / len(own)
    return total


def count_heads(asked: int | None, own: Inputs, theirs: Inputs) -> int:
    """Return the number of relation heads: the asked one, or the most that keep attention heads of both models whole.

    Raises `recipe-out-of-range` where the asked one does not divide every width.
    """
    if asked is None:
        return math.gcd(own[1].shape[1], theirs[1].shape[1])
    for side, owner in ((own, "model"), (theirs, "teacher")):
        widths = [tensor.shape[1] * tensor.shape[2] for tensor in side]
        if any(width % asked for width in widths):
            problem = f"queries, keys and values of the {owner} are {widths} wide, and not divided by {asked}"
            shared = math.gcd(*(t.shape[1] * t.shape[2] for t in (*own, *theirs)))
            raise LuthierError("recipe-out-of-range", problem, where="loss.relation_heads", found=asked,
                               remedy=f"Take a divisor of {shared}, or leave it out.")  # fmt: skip
    return asked


def _inputs(policy: Policy, batch: Batch, layers: list[int], option: str) -> list[Inputs]:
    try:
        return policy.attention_inputs(batch, layers)
    except IndexError as error:
        remedy = "Name layers from 0 to the number of layers less one, or from the end as -1."
        raise LuthierError("recipe-out-of-range", f"there is no such layer: {error}", where=f"loss.{option}",
                           found=layers, remedy=remedy) from None  # fmt: skip


def _regroup(tensor: Tensor, heads: int) -> Tensor:
    """Return [T, heads, d'] of [T, attention heads, d]."""
    return widen(tensor).flatten(1).unflatten(-1, (heads, -1))


def _attended(inputs: Inputs, heads: int) -> Sides:
    """Return queries and the keys that they attend to: each key head stands once for each query head of its group."""
    query, key, _ = inputs
    return _regroup(query, heads), _regroup(key.repeat_interleave(query.shape[1] // key.shape[1], 1), heads)


RELATED: Final[dict[str, Callable[[Inputs, int], Sides]]] = {
    "query": lambda inputs, heads: (_regroup(inputs[0], heads),) * 2,
    "key": lambda inputs, heads: (_regroup(inputs[1], heads),) * 2,
    "value": lambda inputs, heads: (_regroup(inputs[2], heads),) * 2,
    "query_key": _attended,
}


def _sum_divergence(own: Sides, theirs: Sides, batch: Batch) -> Tensor:
    """Return the weighted sum of the divergence of one kind of relation, block by block.

    Where there are several blocks, the relations of each are computed again in the backward pass.
    """
    blocks = list(cut_rows(batch, own[0].shape[1]))
    apart = theirs[0].detach(), theirs[1].detach()
    total = own[0].sum() * 0
    for rows in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_diverge, *own, *apart, rows, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + _diverge(*own, *apart, rows)
    return total


def _diverge(left: Tensor, right: Tensor, their_left: Tensor, their_right: Tensor, rows: Rows) -> Tensor:
    """Return the weighted sum over the rows of KL(teacher || model), averaged over the heads."""
    student, teacher = _relate(left, right, rows), _relate(their_left, their_right, rows)  # [heads, S, L]
    apart = (teacher - student).masked_fill(~rows.related, 0.0)
    return ((teacher.exp() * apart).sum(-1).mean(0) * rows.weights.to(apart)).sum()


def _relate(left: Tensor, right: Tensor, rows: Rows) -> Tensor:
    """Return [heads, S, L]: the log of the relations of the rows' tokens to the columns' tokens."""
    with torch.autocast(left.device.type, enabled=False):
        one, other = left[rows.tokens].transpose(0, 1), right[rows.columns].transpose(0, 1)
        scores = one @ other.transpose(1, 2) * left.shape[-1] ** -0.5
    return scores.masked_fill(~rows.related, -torch.inf).log_softmax(-1)


def cut_rows(batch: Batch, heads: int) -> Iterator[Rows]:
    """Yield the tokens that predict supervised ones, document by document, so that no block has more than BLOCK pairs.

    A single row may have more.
    """
    starts, links = batch.document_starts.tolist(), batch.continues.tolist()
    places, order = batch.previous[batch.supervised].sort(stable=True)
    weights = batch.token_weights[batch.supervised][order]
    ends = torch.searchsorted(places, batch.document_starts.to(places)).tolist()
    for document in range(batch.num_documents):
        before = _continued(document, starts, links)
        known, first, last = sum(stop - start for start, stop in before), ends[document], ends[document + 1]
        while first < last:
            length = starts[document + 1] - starts[document]
            stop = min(last, first + max(1, BLOCK // (heads * (known + length))))
            tokens, shown = places[first:stop], int(places[stop - 1]) + 1
            spans = [*before, (starts[document], shown)]
            columns = torch.cat([torch.arange(*span, device=places.device) for span in spans])
            is_continued = torch.arange(len(columns), device=places.device) < known
            related = is_continued | (columns <= tokens[:, None])
            yield Rows(tokens=tokens, weights=weights[first:stop], columns=columns, related=related)
            first = stop


def _continued(document: int, starts: list[int], links: list[int]) -> list[tuple[int, int]]:
    """Return the spans of the documents that a document continues, first one first."""
    spans: list[tuple[int, int]] = []
    while links[document] >= 0:
        document = links[document]
        spans.insert(0, (starts[document], starts[document + 1]))
    return spans
