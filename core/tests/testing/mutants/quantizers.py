"""Quantizers: one that is sound, and those that break one rule each."""

from __future__ import annotations

import time
from typing import Any

import torch
from luthier.testing.quantizers.kit_quantizer import CodedLinear, CodedQuantizer
from torch import nn
from torch.nn import functional as F


class Rows(CodedQuantizer):
    """The kit's own int8 quantizer; `layer` is what it puts in the place of a linear layer."""

    layer: Any = CodedLinear

    def apply(self, model: Any, context: Any) -> Any:
        found = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and self.takes(m, model)]
        for path, layer in found:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, self.layer(layer))
        return model

    def takes(self, layer: nn.Module, model: Any) -> bool:
        return layer is not model.get_output_embeddings()


class TooCoarse(Rows):
    class layer(CodedLinear):
        def put(self, weight):
            super().put(weight)
            self.scales = self.scales * 16
            self.codes = (weight / self.scales).round().to(torch.int8)


class TakesNothing(Rows):
    def takes(self, layer, model):
        return False


class OtherForward(Rows):
    class layer(CodedLinear):
        def forward(self, states):
            return 1.1 * super().forward(states)


class KeepsGradients(Rows):
    """Its scales are parameters that ask for a gradient."""

    class layer(CodedLinear):
        def __init__(self, layer):
            super().__init__(layer)
            scales = self.scales
            del self.scales
            self.scales = nn.Parameter(scales)

        def put(self, weight):
            scales = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
            if isinstance(getattr(self, "scales", None), nn.Parameter):
                self.scales.data = scales
            else:
                self.scales = scales
            self.codes = (weight / scales).round().to(torch.int8)

        def dequantize(self):
            return super().dequantize().detach()


class DoublesGradients(Rows):
    class layer(CodedLinear):
        def forward(self, states):
            return super().forward(2 * states - states.detach())


class CodesAgain(Rows):
    """A second apply quantizes what is quantized, a little smaller."""

    def apply(self, model, context):
        for module in model.modules():
            if isinstance(module, CodedLinear):
                module.put(0.99 * module.dequantize())
        return super().apply(model, context)


class IgnoresWeight(Rows):
    def requantize(self, layer, weight): ...


class HidesScales(Rows):
    class layer(CodedLinear):
        def __init__(self, layer):
            super().__init__(layer)
            scales = self.scales
            del self.scales
            self.scales = scales


class StoresFloats(Rows):
    class layer(CodedLinear):
        def put(self, weight):
            super().put(weight)
            self.codes = self.codes.float()


class Nameless(Rows):
    class layer(CodedLinear):
        def __init__(self, layer):
            super().__init__(layer)
            self.rows, self.out_features = self.out_features, None


class HalfPrecision(Rows):
    def dequantize(self, layer):
        held = super().dequantize(layer)
        return None if held is None else held.bfloat16()


class TakesTheHead(Rows):
    def takes(self, layer, model):
        return True


class SaysNothing(Rows):
    def progressed(self, progress):
        return None


class RemembersANumber(Rows):
    """What it read from the weight is not among its tensors."""

    class layer(CodedLinear):
        def __init__(self, layer):
            super().__init__(layer)
            self.offset = 0.0 if layer.weight.is_meta else float(layer.weight.abs().mean()) * 1e-3

        def forward(self, states):
            return super().forward(states) + self.offset


class WantsWeights(Rows):
    """Leaves layers alone whose weights are not there yet."""

    def takes(self, layer, model):
        return super().takes(layer, model) and not layer.weight.is_meta


class DrawsForItself(Rows):
    """Its random numbers are not the run's."""

    class layer(CodedLinear):
        def put(self, weight):
            noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(time.perf_counter_ns()))
            super().put(weight * (1 + 1e-3 * noise))


class Scaled(Rows):
    """Sound, with a forward of its own, to show that the check of gradients lets such a layer pass."""

    class layer(CodedLinear):
        def forward(self, states):
            return F.linear(states, self.codes.float()) * self.scales.T
