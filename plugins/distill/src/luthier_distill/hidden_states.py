"""Distances of two models' hidden states, and of the relations among each model's own.

Sanh et al. 2019 (arXiv 1910.01108), Jiao et al. 2020 (1909.10351); relations: Tung & Mori 2019 (1907.09682).
"""

from __future__ import annotations

import torch
from luthier import Batch, LuthierError, Policy
from torch import Tensor

from luthier_distill import Distill


def sum_distances(options: Distill, policy: Policy, batch: Batch) -> Tensor:
    """Return the weighted sum over supervised tokens of the mean distance over the compared layers.

    The states are those from which each token is predicted. Those of the teacher have no gradient.
    """
    own_layers, their_layers = options.compared_layers
    own = _states(policy, batch, own_layers, "hidden_layers")
    theirs = _states(policy.teacher(), batch, their_layers, "teacher_layers")
    weights = batch.token_weights[batch.supervised]
    of_document = batch.document_ids()[batch.supervised]
    distances = [
        relation_distances(mine, other.detach(), of_document)
        if options.hidden_distance == "relation"
        else _distances(mine, other.detach(), options)
        for mine, other in zip(own, theirs, strict=True)
    ]
    return (torch.stack(distances).mean(0) * weights.to(distances[0])).sum()


def _states(policy: Policy, batch: Batch, layers: list[int], option: str) -> list[Tensor]:
    """Return [S, H] of each layer: the states from which the supervised tokens are predicted."""
    try:
        layer_states = policy.hidden(batch, layers)
    except IndexError as error:
        remedy = "Name layers from 0, the embeddings, to the number of layers, or from the end as -1."
        raise LuthierError("recipe-out-of-range", f"there is no such layer: {error}", where=f"loss.{option}",
                           found=layers, remedy=remedy) from None  # fmt: skip
    return [widen(states[batch.previous[batch.supervised]]) for states in layer_states]


def _distances(own: Tensor, theirs: Tensor, options: Distill) -> Tensor:
    """Return the distances [S] of states [S, H] and [S, H]."""
    if own.shape[-1] != theirs.shape[-1]:
        problem = f"the model's states are {own.shape[-1]} wide, and the teacher's {theirs.shape[-1]}"
        raise LuthierError("part-unsupported", problem, where="loss.hidden_weight",
                           remedy="Take a teacher of the same width, or hidden_distance: relation.")  # fmt: skip
    if options.hidden_distance == "mse":
        return (own - theirs).square().mean(-1)
    return 1 - torch.nn.functional.cosine_similarity(own, theirs, dim=-1)


def relation_distances(own: Tensor, theirs: Tensor, of_document: Tensor) -> Tensor:
    """Return [S] from states [S, H] and [S, G]: for each, how far its cosines with its document's states lie apart.

    That is the mean squared difference over the S' states of its document, for which [S', S'] cosines are held.
    """
    distances = own.sum(-1) * 0
    for document in of_document.unique().tolist():
        places = (of_document == document).nonzero().squeeze(-1)
        apart = _cosines(own[places]) - _cosines(theirs[places])
        distances = distances.index_copy(0, places, apart.square().mean(-1))
    return distances


def _cosines(states: Tensor) -> Tensor:
    """Return [S, S] from states [S, H]."""
    straight = torch.nn.functional.normalize(states, dim=-1)
    with torch.autocast(states.device.type, enabled=False):  # which would round what is subtracted next
        return straight @ straight.T


def widen(values: Tensor) -> Tensor:
    """Return the values in float32 or better."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
