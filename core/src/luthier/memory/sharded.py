"""Memory of one rank of a sharded model, from that of a whole one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.step.setup import START

if TYPE_CHECKING:
    from torch import nn

    from luthier.memory.dry_run import Footprint

SPREAD: Final = ("weights", "gradients", "optimizer", START)  # causes that are divided among the ranks
AHEAD: Final = 2  # layers that are whole at one time: the one that computes, and the next one


def divide_footprint(footprint: Footprint, model: nn.Module, ranks: int, *, shards_reference: bool) -> Footprint:
    """Return what one rank holds: its share of what is spread, and whole what lies outside the layers and two of these.

    `shards_reference`: the reference's weights are constants of the adapter, which are spread too, as the start's are.
    """
    from luthier.model.weights.layers import decoder_layers

    layers = list(decoder_layers(model))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    spread = (*SPREAD, *(["reference"] if shards_reference else []))
    causes = {cause: size // ranks if cause in spread else size for cause, size in footprint.causes.items()}
    for cause, trained in (("weights", False), ("gradients", True)):
        largest = max((_bytes(layer.parameters(), trained) for layer in layers), default=0)
        causes[cause] = causes.get(cause, 0) + _bytes(outside, trained) + AHEAD * largest
    return attrs.evolve(footprint, causes=causes)


def _bytes(parameters: Iterable[Any], trained: bool) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad or not trained)
