"""What LoRA needs from a layer (sizes and weight), and the pieces of every wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import attrs
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Dequantize = Callable[[nn.Module], Tensor]


@attrs.define
class Switch:
    """The switch that wrappers share: on, they add their update."""

    enabled: bool = True


@attrs.frozen(kw_only=True)
class Form:
    """The form of one update: rank, scale, dropout and initialisation."""

    rank: int
    scale: float
    dropout: float
    dtype: torch.dtype
    device: torch.device
    trains_bias: bool = False
    learns_scale: bool = False

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class Factor(nn.Module):
    """A trainable matrix. It is not an `nn.Linear`, so that searches for layers do not find it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a layer that multiplies by a matrix, or None for any other module."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a layer that multiplies by a matrix."""
    sizes = features(layer)
    assert sizes is not None, f"{type(layer).__name__} has no matrix"
    return sizes


def is_dense(layer: nn.Module) -> bool:
    """Return True if `layer.weight` is the weight that the layer computes with.

    Types are compared exactly, because a subclass may compute with something else.
    """
    if type(layer) not in (nn.Linear, Conv1D):
        return False
    weight = cast(Tensor, layer.weight)
    if type(weight) is not nn.Parameter and not getattr(weight, "has_no_data", False):
        return False
    return weight.is_floating_point() and weight.element_size() > 1  # float8 is a code


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight [out, in] of a dense layer, as a view in its own dtype."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # type: ignore[return-value]


def compute_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """Return the dtype of an update of `x`: bfloat16 for bfloat16, otherwise float32 or better."""
    return x.dtype if x.dtype is torch.bfloat16 else torch.promote_types(x.dtype, parameter.dtype)
