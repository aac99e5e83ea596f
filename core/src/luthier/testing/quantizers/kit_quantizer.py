"""A small int8 quantizer of the kit's own, so that adapters can be checked on a quantized base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Context


class CodedLinear(nn.Module):
    """A linear layer of int8 codes [out, in] and a float32 scale for each row.

    Its weight exists only within forward.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.register_buffer("codes", torch.zeros_like(layer.weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("scales", torch.zeros(layer.out_features, 1))
        self.put(layer.weight.detach().float())

    def put(self, weight: Tensor) -> None:
        """Quantize a weight [out, in]: the largest magnitude of each row becomes 127."""
        self.scales = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        self.codes = (weight / self.scales).round().to(torch.int8)

    def dequantize(self) -> Tensor:
        return self.codes * self.scales

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.dequantize().to(states.dtype), self.bias)


class CodedQuantizer(Quantizer):
    """A quantizer of every linear layer except the output head."""

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def apply(self, model: Any, context: Context) -> Any:
        head = model.get_output_embeddings()
        linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]
        for path, layer in linears:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, CodedLinear(layer))
        return model

    def dequantize(self, layer: Any) -> Tensor | None:
        return layer.dequantize() if isinstance(layer, CodedLinear) else None

    def requantize(self, layer: Any, weight: Tensor) -> None:
        layer.put(weight)
