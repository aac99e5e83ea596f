"""The sums of `distill` computed from all logits, token by token: the reference of the conformance kit."""

from __future__ import annotations

import math

import torch
from luthier import Batch, Policy
from torch import Tensor

from luthier_distill import Distill


def plain_sums(options: Distill, policy: Policy, batch: Batch) -> dict[str, Tensor]:
    """Return the sum of each term."""
    sources, teacher = batch.previous[batch.supervised], policy.teacher()
    own = policy.head(policy.states(batch)[sources]).double()
    theirs = teacher.head(teacher.states(batch)[sources]).double()
    sums = {"divergence": own.sum() * 0}
    if options.ce_weight:
        sums["cross_entropy"] = own.sum() * 0
    for row, position in enumerate(batch.supervised.tolist()):
        weight = batch.token_weights[position]
        divergence = divergence_of(options, (own[row] / options.temperature).softmax(-1), theirs[row])
        sums["divergence"] = sums["divergence"] + weight * options.temperature**2 * divergence
        if options.ce_weight:
            likelihood = own[row].softmax(-1)[batch.labels[position]].log()
            sums["cross_entropy"] = sums["cross_entropy"] - options.ce_weight * weight * likelihood
    if options.hidden_weight:
        sums["hidden"] = options.hidden_weight * _hidden(options, policy, batch)
    if options.attention_weight:
        sums["attention"] = options.attention_weight * sum_plain_relations(options, policy, batch)
    return sums


def sum_plain_relations(options: Distill, policy: Policy, batch: Batch) -> Tensor:
    """Return the weighted divergence of attention relations, one token, layer, relation and head at a time."""
    own_layers, their_layers = options.related_layers
    own = policy.attention_inputs(batch, own_layers)
    pairs = list(zip(own, policy.teacher().attention_inputs(batch, their_layers), strict=True))
    total = own[0][0].double().sum() * 0
    for position in batch.supervised.tolist():
        source = int(batch.previous[position])
        seen = _seen(batch, source)
        for mine, other in pairs:
            heads = options.relation_heads or math.gcd(mine[1].shape[1], other[1].shape[1])
            for kind in options.compared_relations:
                student, teacher = (_relations(side, kind, heads, source, seen) for side in (mine, other))
                divergence = (teacher * (teacher.log() - student.log())).sum() / heads
                total = total + batch.token_weights[position] * divergence / len(pairs)
    return total


def _seen(batch: Batch, source: int) -> list[int]:
    """Return the places of the tokens up to this one, in its document and those that the document continues."""
    document = int(batch.document_ids()[source])
    seen = list(range(int(batch.document_starts[document]), source + 1))
    while (document := int(batch.continues[document])) >= 0:
        seen = [*range(*batch.document_starts[document : document + 2].tolist()), *seen]
    return seen


def _relations(inputs: tuple[Tensor, Tensor, Tensor], kind: str, heads: int, source: int, seen: list[int]) -> Tensor:
    """Return [heads, L]: the relations of the token at `source` to those at the places `seen`."""
    query, key, value = (tensor.double() for tensor in inputs)
    group = query.shape[1] // key.shape[1]
    grouped = torch.stack([key[:, head // group] for head in range(query.shape[1])], dim=1)
    left, right = {"query": (query, query), "key": (key, key), "value": (value, value), "query_key": (query, grouped)}[
        kind
    ]
    rows = []
    for head in range(heads):
        one, other = (side.reshape(len(side), -1).chunk(heads, dim=-1)[head] for side in (left, right))
        rows.append((other[seen] @ one[source] / math.sqrt(one.shape[-1])).softmax(-1))
    return torch.stack(rows)


def _hidden(options: Distill, policy: Policy, batch: Batch) -> Tensor:
    """Return the weighted distance of hidden states, state by state."""
    own, theirs = options.compared_layers
    pairs = list(zip(policy.hidden(batch, own), policy.teacher().hidden(batch, theirs), strict=True))
    total = pairs[0][0].double().sum() * 0
    for position in batch.supervised.tolist():
        for mine, other in pairs:
            if options.hidden_distance == "relation":
                apart = _relation(batch, position, mine.double(), other.double())
            else:
                a, b = (side[batch.previous[position]].double() for side in (mine, other))
                apart = ((a - b) ** 2).mean() if options.hidden_distance == "mse" else 1 - _cosine(a, b)
            total = total + batch.token_weights[position] * apart / len(pairs)
    return total


def _relation(batch: Batch, position: int, own: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean squared difference of a state's cosines, in both models, with those of its document."""
    documents, source = batch.document_ids(), batch.previous[position]
    beside = [p for p in batch.supervised.tolist() if documents[p] == documents[position]]
    gaps = []
    for other in batch.previous[beside].tolist():
        gaps.append(_cosine(own[source], own[other]) - _cosine(theirs[source], theirs[other]))
    return torch.stack(gaps).square().mean()


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return one @ other / (one.norm() * other.norm())


def divergence_of(options: Distill, student: Tensor, logits: Tensor) -> Tensor:
    """Return the divergence of probabilities [V] from those of a teacher's logits [V]."""
    teacher = (logits / options.temperature).softmax(-1)
    if options.top_k is not None and options.top_k < len(teacher):
        best = teacher.argsort(descending=True)[: options.top_k]
        parts = [torch.stack([side[t] for t in best]) for side in (student, teacher)]
        if options.add_tail:
            parts = [torch.cat([part, 1 - part.sum()[None]]) for part in parts]
        student, teacher = (part / part.sum() for part in parts)
    share = options.beta or 0.5
    mixture = share * teacher + (1 - share) * student
    if options.divergence == "jsd":
        return (
            share * (teacher * (teacher / mixture).log()).sum()
            + (1 - share) * (student * (student / mixture).log()).sum()
        )
    pair = (teacher, student) if options.divergence == "forward_kl" else (student, teacher)
    return (pair[0] * (pair[0] / pair[1]).log()).sum()
