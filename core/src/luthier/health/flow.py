"""Gradient flow: how much gradient reaches each layer, and how far a step moves the layer's weights."""

from __future__ import annotations

import re
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from luthier.model.weights.shard_tensors import whole_tensor
from luthier.plugins.contracts.protocols import Adapter

LAYER: Final = re.compile(
    r"(?:^|\.)((?:[A-Za-z_]\w*)\.\d+)(?:\.|$)"
)  # matches `layers.3` in `model.layers.3.mlp.up_proj.weight`
TINY: Final = 1e-30


@attrs.frozen(kw_only=True)
class Flow:
    """The flow of one layer in one step, over all its trained parameters together."""

    layer: str
    parameters: int
    gradient: float  # norm, before clipping
    weight: float  # norm, before the step
    update: float  # norm of what the step added

    @property
    def ratio(self) -> float:
        """Return update divided by weight. 1e-3 is usual; below 1e-6 next to nothing is learnt."""
        return self.update / max(self.weight, TINY)

    def to_dict(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "ratio": self.ratio}


class FlowMeter:
    """A copy of the weights before a step, kept in host memory, with which `measure` compares them."""

    def __init__(self, adapter: Adapter) -> None:
        self.named = [pair for group in adapter.groups() for pair in zip(group.names, group.parameters, strict=True)]
        self.before = [parameter.detach().to("cpu", copy=True) for _, parameter in self.named]

    def measure(self, norm: float, limit: float | None) -> list[Flow]:
        """Return each layer's flow, the first layer first.

        `norm` is the whole gradient's, clipped to `limit`. Collective.
        """
        clipped = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        sums: dict[str, list[float]] = {}
        for (name, parameter), held_before in zip(self.named, self.before, strict=True):
            before = held_before.to(parameter.device)
            gradient = torch.zeros_like(before) if parameter.grad is None else parameter.grad
            squares = (_square(gradient) / clipped**2, _square(before), _square(parameter.detach() - before))
            total = sums.setdefault(layer_of(name), [0, 0.0, 0.0, 0.0])
            for place, value in enumerate((parameter.numel(), *squares)):
                total[place] += value
        return [
            Flow(layer=layer, parameters=int(count), gradient=g**0.5, weight=w**0.5, update=u**0.5)
            for layer, (count, g, w, u) in sums.items()
        ]


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to: `layers.3`, or its module if it is in no numbered layer."""
    match = LAYER.search(name)
    return match.group(1) if match else name.rpartition(".")[0] or name


def flow_metrics(flows: list[Flow]) -> dict[str, float]:
    """Return the flow as metrics: `gradient/layers.3`, `update_ratio/layers.3`."""
    gradients = {f"gradient/{flow.layer}": flow.gradient for flow in flows}
    return {**gradients, **{f"update_ratio/{flow.layer}": flow.ratio for flow in flows}}


def _square(tensor: Tensor) -> float:
    """Return the sum of squares, over all ranks."""
    return float(whole_tensor(tensor.float() if tensor.dtype != torch.float64 else tensor).square().sum())
