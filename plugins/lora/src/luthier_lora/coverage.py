"""Measure how much of a model's weights an adapter reaches, and what the rest is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from luthier_lora.experts import ParameterWrapper
from luthier_lora.kept import BiasedModule, SavedModule
from luthier_lora.layers import Factor, features
from luthier_lora.targets import is_sparse
from luthier_lora.wrappers import LoraLayer

OWN = (
    LoraLayer,
    ParameterWrapper,
    Factor,
    BiasedModule,
    SavedModule,
)  # modules whose own parameters are no base weights


def coverage(model: Any, names: list[str]) -> dict[str, Any]:
    """Return how much of the base weights the adapter reaches. A tied weight counts once.

    - `matched`: the names of the weights that have an update.
    - `reached_share`: their share of all base weights, 0 to 1.
    - `unreached`: kind (embedding, head, experts, linear, other) -> share of all base weights.
    """
    matched = set(names)
    head = model.get_output_embeddings()
    copies = {path for path, module in model.named_modules() if isinstance(module, SavedModule)}
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "").removesuffix(".original")
        if isinstance(module, OWN) or path.removesuffix(".trained") in copies:
            continue
        for weight, size in _weights(module, seen):
            trains = getattr(getattr(module, weight, None), "requires_grad", False)  # a bias
            reached = trains or name in matched or f"{name}.{weight}" in matched
            sizes["reached" if reached else _kind(model, module, name, head)] += size
    total = sum(sizes.values())
    reached = sizes.pop("reached", 0)
    shares = {kind: size / total for kind, size in sorted(sizes.items())}
    return {"matched": names, "reached_share": reached / total, "unreached": shares}


def _weights(module: nn.Module, seen: set[int]) -> list[tuple[str, int]]:
    """Return (name, elements) of a module's own weights. A packed weight counts as its matrix."""
    fresh = [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in seen]
    seen.update(id(p) for _, p in fresh)
    shape = features(module)
    sizes = [(name, p.numel()) for name, p in fresh if not (shape and name == "weight")]
    tied = isinstance(getattr(module, "weight", None), nn.Parameter) and "weight" not in dict(fresh)
    return sizes if shape is None or tied else [("weight", shape[0] * shape[1]), *sizes]


def _kind(model: Any, module: nn.Module, name: str, head: nn.Module | None) -> str:
    if module is head or getattr(head, "base_layer", None) is module:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_sparse(model, name):
        return "experts"
    return "linear" if features(module) else "other"
