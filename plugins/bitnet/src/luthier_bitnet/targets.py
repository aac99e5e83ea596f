"""Which layers a quantizer takes: dense ones, but for head, routers, tied weights and what the user skips."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Any

import torch
from luthier import LuthierError
from torch import nn
from transformers.pytorch_utils import Conv1D

DENSE = (nn.Linear, Conv1D)  # exact types: a subclass may compute something else
ROUTERS = ("gate", "router")  # of experts, by the last part of their path: small, and a wrong expert costs much


def choose_layers(model: nn.Module, skip_modules: list[str], name: str) -> dict[str, nn.Module]:
    """Return path -> layer, for every dense layer that is neither skipped nor shares its weight with another module.

    Raises `model-target` where an entry of `skip_modules` names no module. `name` is the quantizer's.
    """
    places = list(model.named_modules(remove_duplicate=False))
    skipped = _skipped(model, [path for path, _ in places], skip_modules, name)
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {
        path: module
        for path, module in places
        if type(module) in DENSE and path not in skipped and owners[id(module.weight)] == 1
    }


def _skipped(model: nn.Module, paths: list[str], skip_modules: list[str], name: str) -> set[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {path for path in paths if head is not None and model.get_submodule(path) is head}
    routers = {path for path in paths if path.rpartition(".")[2] in ROUTERS}
    return (heads | routers).union(*(_within(entry, paths, name) for entry in skip_modules))


def _within(entry: str, paths: list[str], name: str) -> set[str]:
    """The modules that an entry of `skip_modules` names, by whole parts of their path, and all inside them."""
    found = {path for path in paths if path and f".{entry}." in f".{path}."}
    if not found:
        near = difflib.get_close_matches(entry, {p for path in paths for p in (path, *path.split("."))} - {""})
        remedy = f"Near misses: {', '.join(near)}." if near else "Print the model to see the names of its modules."
        raise LuthierError("model-target", f"{entry!r} names no module", where=f"{name}.skip_modules", remedy=remedy)
    return found


def check_finite(path: str, layer: Any, name: str) -> None:
    """Raise `NAME:nonfinite-weight` where a weight is NaN or infinite."""
    if not torch.isfinite(layer.weight).all():
        remedy = "Check the checkpoint, or leave the layer exact with skip_modules."
        raise LuthierError(f"{name}:nonfinite-weight", "a weight is NaN or infinite", where=path, remedy=remedy)


def check_unquantized(model: nn.Module, name: str) -> None:
    """Raise `part-unsupported` for a model that is quantized already."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
        problem = f"quantizer '{name}' needs dense weights, and the checkpoint is quantized already"
        remedy = "Begin from the checkpoint that it was made of."
        raise LuthierError("part-unsupported", problem, found=str(getattr(method, "value", method)), remedy=remedy)
