"""Saving what a run has trained: the adapter alone, or a merged model that plain transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts.folders import write_artifact
from luthier.artifacts.verify import check_adapter, check_model, check_trained
from luthier.errors import LuthierError
from luthier.model.attention import ordinary_attention
from luthier.model.load import quiet
from luthier.model.weights.dense_files import Files, save_model
from luthier.model.weights.quantized import QUANTIZED
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.recipe.checks.soundness import unmergeable_part
from luthier.step.context import ContextSources, context_for


def artifact_name(adapter: Adapter) -> str:
    """The folder that an adapter's `save` fills: `adapter`, or `model` for one that is a whole model."""
    return getattr(adapter, "artifact", "adapter")


def save_adapter(
    model: Any, tokenizer: Any, adapter: Adapter, folder: Path, note: dict[str, Any], quantizer: Any = None
) -> Path:
    """What `adapter.save` writes, with the tokenizer, checked by reading it back."""
    is_model = artifact_name(adapter) == "model"
    is_trained = is_model and quantizer is not None and quantizer.trains

    def write(aside: Path) -> None:
        with portable_model(model):
            adapter.save(aside)
        tokenizer.save_pretrained(aside)
        if is_trained:
            check_trained(model, aside, note, quantizer)
        elif is_model:
            check_model(model, aside, adapter)
        else:
            check_adapter(model, adapter, aside, note)

    return write_artifact(folder, write, {**note, "artifact": QUANTIZED if is_trained else artifact_name(adapter)})


def save_merged(
    model: Any, tokenizer: Any, adapter: Adapter, quantizer: Quantizer, folder: Path, note: dict[str, Any]
) -> Path:
    """A dense model in plain transformers' layout, checked by loading it there. The live model stays as it is.

    `adapter` None: the model has none. Raises `artifact-unmergeable` where a part cannot be merged.
    """
    for kind, part in (("adapter", adapter), ("quantizer", quantizer)):
        if not getattr(part, "mergeable", True):
            raise unmergeable_part(kind, note[kind].get("name", type(part).__name__))

    def write(aside: Path) -> None:
        merged = merged_copy(model, adapter, quantizer)
        files = Files.of_note(note)
        with portable_model(merged):
            save_model(merged, aside, files)
        tokenizer.save_pretrained(aside)
        check_model(model, aside, adapter)

    return write_artifact(folder, write, {**note, "artifact": "model"})


def merged_copy(model: Any, adapter: Adapter, quantizer: Quantizer) -> Any:
    """A copy of the model in plain dense layers, the adapter folded in."""
    model, adapter = copy.deepcopy((model, adapter))
    plain = _skeleton(model)
    for path, layer in list(model.named_modules()):
        weight = quantizer.dequantize(layer)
        if weight is not None:
            _replace(model, path, _linear(weight, getattr(layer, "bias", None), model.dtype))
    context = context_for(model, quantizer, ContextSources(purpose="open", seed=0, original=_no_original))
    merged = model if adapter is None else adapter.merge(context)
    for path, layer in plain.named_modules():
        linear = merged.get_submodule(path) if type(layer).__name__ == "Conv1D" else None
        if isinstance(linear, nn.Linear):
            _replace(merged, path, _transposed(linear, layer))
    if any(p.is_floating_point() and not torch.isfinite(p).all() for p in merged.parameters()):
        raise LuthierError("artifact-unmergeable", "the merged weights hold NaN or infinity")
    return merged


@contextmanager
def portable_model(model: Any) -> Iterator[None]:
    """While a model is written: an attention that every machine has, and no bar."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ordinary_attention(model))
    try:
        with quiet():
            yield
    finally:
        model.set_attn_implementation(before)


def _skeleton(model: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)(model.config)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)


def _transposed(layer: nn.Linear, pattern: nn.Module) -> nn.Module:
    """A Linear as the Conv1D that the architecture has in its place."""
    make: Any = type(pattern)
    made = make(layer.weight.shape[0], layer.weight.shape[1])
    with torch.no_grad():
        made.weight = nn.Parameter(layer.weight.T.contiguous())
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias)
    return made


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _no_original(layer: nn.Module) -> torch.Tensor:
    raise LuthierError("artifact-unmergeable", "this adapter wants the original weights, which are not at hand here")
