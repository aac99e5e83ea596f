"""Folding an adapter into its base weights, so that plain transformers computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luthier import Context, LuthierError
from luthier_lora.layers import LoraLayer, dense_weight, is_dense


def fold(model: Any, context: Context) -> Any:
    """The model with a plain layer in each wrapper's place; every weight is checked before the first is changed."""
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    with torch.no_grad():
        for name, wrapper in wrappers.items():
            _check(name, wrapper)
        for name, wrapper in wrappers.items():
            model.set_submodule(name, _plain(wrapper, context))
    return model


def _check(name: str, wrapper: LoraLayer) -> None:
    for part, parameter in wrapper.named_parameters():
        if part.startswith("lora_") and not parameter.isfinite().all():
            raise LuthierError("artifact-unmergeable", "NaN or infinite numbers in the adapter", where=f"{name}.{part}")


def _plain(wrapper: LoraLayer, context: Context) -> nn.Module:
    layer = wrapper.base_layer
    weight = wrapper.folded_weight()
    if is_dense(layer):
        dense_weight(layer).copy_(weight)
        return layer
    dense = nn.Linear(wrapper.in_features, wrapper.out_features, bias=wrapper.bias is not None, dtype=context.dtype)
    dense.weight.copy_(weight)
    return dense
