"""Queries, keys and values as attention gets them, kept for a loss that compares them with another model's.

They are kept where `attend_documents` is called, whatever made them: separate or fused projections, quantized layers,
adapters. So they are those of the pass whose graph the loss differentiates; when a layer is computed again in backward,
nothing is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

Inputs = tuple[Tensor, Tensor, Tensor]  # queries [T, heads, d], keys [T, key-value heads, d], values likewise

_KEPT: ContextVar[tuple[Collection[int], dict[int, Inputs]] | None] = ContextVar("kept", default=None)


@contextmanager
def record_inputs(layers: Collection[int]) -> Iterator[dict[int, Inputs]]:
    """Give a dict that gets the attention inputs of these layers within this context, by the layer's number."""
    kept: dict[int, Inputs] = {}
    token = _KEPT.set((layers, kept))
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def keep_inputs(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Keep what an attention module of a wanted layer attends with. Tensors are [1, heads, T, d]."""
    wanted = _KEPT.get()
    layer = getattr(module, "layer_idx", None)
    if wanted is not None and layer is not None and layer in wanted[0]:
        wanted[1][layer] = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
