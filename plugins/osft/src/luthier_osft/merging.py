"""Merge the change into the weights, so that plain transformers computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from luthier import Context, LuthierError
from torch import Tensor, nn

from luthier_osft.layers import OsftLayer, is_dense


@torch.no_grad()
def fold_layers(model: Any, weights: Mapping[str, tuple[OsftLayer, Tensor]], context: Context) -> Any:
    """Replace each layer by a plain one with its weight [out, in]. All are checked before one changes."""
    for name, (layer, weight) in weights.items():
        dtype = layer.base_layer.weight.dtype if is_dense(layer.base_layer) else context.dtype
        if not weight.to(dtype).isfinite().all():  # type: ignore[arg-type]
            problem = f"the merged weight holds NaN or leaves the range of {dtype}"
            raise LuthierError("artifact-unmergeable", problem, where=name, remedy="Use an earlier checkpoint.")
    for name, (layer, weight) in weights.items():
        model.set_submodule(name, _plain_layer(layer.base_layer, weight, context))
    return model


def _plain_layer(base: Any, weight: Tensor, context: Context) -> nn.Module:
    """Return the base layer with the weight [out, in], or a dense layer instead of a quantized one."""
    if is_dense(base):
        context.requantize(base, weight)
        return base
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=getattr(base, "bias", None) is not None)
    dense.to(device=weight.device, dtype=context.dtype).requires_grad_(False).train(base.training)
    dense.weight.copy_(weight)
    if dense.bias is not None:
        dense.bias.copy_(base.bias)
    return dense
