"""The quantizer parts `bnb.nf4`, `bnb.fp4` and `bnb.int8`: which layers of a model they take."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Any

import torch
from luthier import Context, LuthierError, get_logger
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_bitsandbytes import BnbFp4, BnbInt8, BnbNf4
from luthier_bitsandbytes.layer import BnbLinear, Form

DENSE = (nn.Linear, Conv1D)  # exact types: a subclass may compute something else
log = get_logger()


class BnbQuantizer:
    """The linear layers of a base model in bitsandbytes' form; what is skipped, tied or no such layer stays exact."""

    def __init__(self, options: BnbNf4 | BnbInt8) -> None:
        self.options = options
        if isinstance(options, BnbInt8):
            self.form = Form(kind="int8")
        else:
            kind = "fp4" if isinstance(options, BnbFp4) else "nf4"
            self.form = Form(kind=kind, block_size=options.block_size, nested=options.use_double_quant)
        self.name = f"bnb.{self.form.kind}"

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Put a `BnbLinear` in the place of each layer taken, in place. A second time nothing is left to do.

        Raises `model-target` where an entry of `skip_modules` names no module, `part-unsupported` where no layer is
        taken or the model is quantized already, `NAME:nonfinite-weight` where a weight holds NaN or infinity.
        """
        self._check_dense(model)
        chosen = self._chosen(model)
        if not chosen and not any(isinstance(m, BnbLinear) for m in model.modules()):
            problem = f"quantizer '{self.name}' finds no linear layer"
            raise LuthierError("part-unsupported", problem, where=type(model).__name__)
        if context.has_values:
            for path, layer in chosen.items():
                self._check_finite(path, layer)
        advance = context.progress(len(chosen), f"quantizing to {self.name}")
        made: dict[int, BnbLinear] = {}  # a layer used in two places stays one layer
        for path, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = self._quantized(layer, context.has_values)
            model.set_submodule(path, made[id(layer)])
            advance()
        log.info(f"quantized to {self.name}", layers=len(made))
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, BnbLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [out, in] into a layer of ours, in place."""
        if not isinstance(layer, BnbLinear):
            problem = f"not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def _quantized(self, layer: Any, has_values: bool) -> BnbLinear:
        made = BnbLinear(layer, self.form)
        if has_values:
            made.put(layer.weight.T if made.transposed else layer.weight)
        return made

    def _chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """Path -> layer, for every dense layer that is neither skipped nor shares its weight with another module."""
        places = list(model.named_modules(remove_duplicate=False))
        skipped = self._skipped(model, [path for path, _ in places])
        owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
        return {
            path: module
            for path, module in places
            if type(module) in DENSE and path not in skipped and owners[id(module.weight)] == 1
        }

    def _skipped(self, model: nn.Module, paths: list[str]) -> set[str]:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {path for path in paths if head is not None and model.get_submodule(path) is head}
        return heads.union(*(self._within(entry, paths) for entry in self.options.skip_modules))

    def _within(self, entry: str, paths: list[str]) -> set[str]:
        """The modules that an entry of `skip_modules` names, by whole parts of their path, and all inside them."""
        found = {path for path in paths if path and f".{entry}." in f".{path}."}
        if not found:
            names = {part for path in paths for part in (path, *path.split("."))} - {""}
            near = difflib.get_close_matches(entry, names)
            remedy = f"Near misses: {', '.join(near)}." if near else "Print the model to see the names of its modules."
            where = f"{self.name}.skip_modules"
            raise LuthierError("model-target", f"{entry!r} names no module", where=where, remedy=remedy)
        return found

    def _check_finite(self, path: str, layer: Any) -> None:
        if not torch.isfinite(layer.weight).all():
            remedy = "Check the checkpoint, or leave the layer exact with skip_modules."
            problem = "a weight is NaN or infinite"
            raise LuthierError("bitsandbytes:nonfinite-weight", problem, where=path, remedy=remedy)

    def _check_dense(self, model: nn.Module) -> None:
        found = getattr(getattr(model, "config", None), "quantization_config", None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
            remedy = "Use quantizer: none with it, or begin from the checkpoint that it was made of."
            problem = f"quantizer '{self.name}' needs dense weights, and the checkpoint is quantized already"
            raise LuthierError("part-unsupported", problem, found=str(getattr(method, "value", method)), remedy=remedy)
