"""The layers that stand in a wrapped layer's place: the forward pass of LoRA and DoRA, and their folded weight.

LoRA: Hu et al. 2021 (arXiv 2106.09685). Scale of rsLoRA: Kalajdzievski 2023 (2312.03732). DoRA: Liu et al. 2024
(2402.09353). Tensors carry PEFT's names, so that the path of a parameter is its name in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

Dequantize = Callable[[nn.Module], Tensor]


@attrs.define
class Switch:
    """Whether the layers that share it add their update."""

    enabled: bool = True


@attrs.frozen(kw_only=True)
class Form:
    """What a layer's update is made of."""

    rank: int
    scale: float
    dropout: float
    dtype: torch.dtype
    device: torch.device


class Factor(nn.Module):
    """One trainable matrix; not an `nn.Linear`, so that whatever looks for layers does not find it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that multiplies by a matrix; None for any other module."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def is_dense(layer: nn.Module) -> bool:
    """Whether `layer.weight` is the weight itself, neither packed codes nor a tensor class that stands for them."""
    weight = getattr(layer, "weight", None)
    plain = isinstance(layer, (nn.Linear, Conv1D)) and type(weight) is nn.Parameter
    return plain and weight.is_floating_point() and weight.element_size() > 1  # type: ignore[union-attr]


def dense_weight(layer: nn.Module) -> Tensor:
    """[out, in] of a dense layer, a view in its own dtype."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # type: ignore[return-value,operator]


class LoraLayer(nn.Module):
    """y = base(x) + scale B A x, with A [r, in] and B [out, r]."""

    def __init__(self, base_layer: nn.Module, form: Form, switch: Switch, dequantize: Dequantize) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)  # type: ignore[misc]
        self.scale, self.switch, self.dequantize = form.scale, switch, dequantize
        empty = {"dtype": form.dtype, "device": form.device}
        self.lora_A = Factor(torch.empty(form.rank, self.in_features, **empty))
        self.lora_B = Factor(torch.zeros(self.out_features, form.rank, **empty))
        self.lora_dropout = nn.Dropout(form.dropout)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's; some models ask a layer for its weight's dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x [..., in]
        result = self.base_layer(x, *args, **kwargs)
        return self.adapted(x, result) if self.switch.enabled else result

    def adapted(self, x: Tensor, result: Tensor) -> Tensor:
        """`result`, the base layer's [..., out], with the update of `x` [..., in] added."""
        return result + self.update(x).to(result.dtype)

    def update(self, x: Tensor) -> Tensor:
        """scale B A x, [..., out]. bfloat16 inputs are multiplied in bfloat16, any other in float32 or better."""
        dtype = x.dtype if x.dtype is torch.bfloat16 else torch.promote_types(x.dtype, self.lora_A.weight.dtype)
        inner = functional.linear(self.lora_dropout(x.to(dtype)), self.lora_A.weight.to(dtype))
        return functional.linear(inner * self.scale, self.lora_B.weight.to(dtype))

    def base_weight(self) -> Tensor:
        """[out, in] in the adapter's dtype or wider, dequantized where it must be."""
        layer, dtype = self.base_layer, self.lora_A.weight.dtype
        weight = dense_weight(layer) if is_dense(layer) else self.dequantize(layer)
        return weight.detach().to(torch.promote_types(weight.dtype, dtype))

    def folded_weight(self) -> Tensor:
        """[out, in] the weight of one plain layer that computes the same."""
        weight = self.base_weight()
        return weight.addmm(self.lora_B.weight.to(weight.dtype), self.lora_A.weight.to(weight.dtype), alpha=self.scale)

    def magnitudes(self) -> list[str]:
        """Names of this layer's parameters that are not matrices."""
        return []
