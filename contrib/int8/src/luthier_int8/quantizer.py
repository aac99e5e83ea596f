"""The quantizer part `int8`: which layers of a model it takes, and what becomes of them."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Any, cast

import torch
from luthier import Context, LuthierError, get_logger
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_int8 import Int8
from luthier_int8.layer import Int8Linear

DENSE = (nn.Linear, Conv1D)  # exact types: a subclass may compute something else
log = get_logger()


class Int8Quantizer:
    """The linear layers of a base model in int8; embeddings, norms, tied weights and what is skipped stay exact."""

    def __init__(self, options: Int8) -> None:
        self.options = options

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Put an `Int8Linear` in the place of each layer taken, in place. A second time nothing is left to do.

        Raises `model-target` where an entry of `skip_modules` names no module, `part-unsupported` where no layer is
        taken, `int8:nonfinite-weight` where a weight holds NaN or infinity.
        """
        chosen = self._chosen(model)
        if not chosen and not any(isinstance(m, Int8Linear) for m in model.modules()):
            raise LuthierError("part-unsupported", "quantizer 'int8' finds no linear layer", where=type(model).__name__)
        if context.has_values:
            for name, layer in chosen.items():
                _check_finite(name, layer)
        made: dict[int, Int8Linear] = {}  # a layer used in two places stays one layer
        for name, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = Int8Linear.of(cast("nn.Linear | Conv1D", layer), self.options.group_size)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made[id(layer)])
        exact = sum(parameter.numel() for parameter in model.parameters())
        log.info("quantized to int8", layers=len(made), weights=_weights(model), left_exact=exact)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, Int8Linear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [out, in] into a layer of ours, in place."""
        if not isinstance(layer, Int8Linear):
            raise LuthierError("part-unsupported", "not a layer of quantizer 'int8'", found=type(layer).__name__)
        layer.put(weight)

    def _chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """Name -> layer, for every dense layer that is neither skipped nor shares its weight with another module."""
        places = list(model.named_modules(remove_duplicate=False))
        skipped = self._skipped(model, [name for name, _ in places])
        owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
        return {
            name: module
            for name, module in places
            if type(module) in DENSE and name not in skipped and owners[id(module.weight)] == 1
        }

    def _skipped(self, model: nn.Module, names: list[str]) -> set[str]:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {name for name in names if head is not None and model.get_submodule(name) is head}
        return heads.union(*(_within(entry, names) for entry in self.options.skip_modules))


def _within(entry: str, names: list[str]) -> set[str]:
    """The modules that an entry of `skip_modules` names, by whole parts of their path, and all inside them."""
    found = {name for name in names if name and f".{entry}." in f".{name}."}
    if not found:
        near = difflib.get_close_matches(entry, {part for name in names for part in (name, *name.split("."))} - {""})
        remedy = f"Near misses: {', '.join(near)}." if near else "Print the model to see the names of its modules."
        raise LuthierError("model-target", f"{entry!r} names no module", where="int8.skip_modules", remedy=remedy)
    return found


def _weights(model: nn.Module) -> int:
    """How many weights of a model are int8."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, Int8Linear))


def _check_finite(name: str, layer: Any) -> None:
    if not torch.isfinite(layer.weight).all():
        remedy = "Check the checkpoint, or leave the layer exact with skip_modules."
        raise LuthierError("int8:nonfinite-weight", "a weight is NaN or infinite", where=name, remedy=remedy)
