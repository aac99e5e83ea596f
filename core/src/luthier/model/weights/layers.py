"""Decoder layers: the repeated blocks that a model is a stack of, and the depth of everything in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import nn

# attributes with the hooks of a module
HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def decoder_layers(model: Any) -> Iterator[nn.Module]:
    """Yield the blocks in order, none inside another: as transformers marks them, or else the outermost lists of
    modules.
    """
    layers = list(_marked(model)) or list(_listed(model))
    yield from layers


def layer_depths(model: Any) -> dict[str, int]:
    """Return the number from 0 of each decoder layer, by its path."""
    numbers = {id(layer): number for number, layer in enumerate(decoder_layers(model))}
    return {path: numbers[id(module)] for path, module in model.named_modules() if id(module) in numbers}


def _marked(model: Any) -> Iterator[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = set(getattr(model, "_no_split_modules", None) or ())
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in named:
            inside |= {id(m) for m in module.modules()}
            yield module


def _listed(model: nn.Module) -> Iterator[nn.Module]:
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside |= {id(m) for m in module.modules()}
            yield from (entry for entry in module if any(True for _ in entry.parameters()))
