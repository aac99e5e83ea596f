"""The quantizer parts `ternary` and `bitnet`: which layers they take, and how these become ternary."""

from __future__ import annotations

import difflib
from collections import Counter
from typing import Any, cast

import torch
from luthier import Context, LuthierError, Multipliers, Progress, get_logger
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_bitnet.layer import Form, Stage, TernaryLinear
from luthier_bitnet.options import Bitnet, Ternary

DENSE = (nn.Linear, Conv1D)  # exact types: a subclass may compute something else
ROUTERS = ("gate", "router")  # of experts, by the last part of their path: small, and a wrong expert costs much
log = get_logger()


class TernaryQuantizer:
    """The linear layers of a model, trained to be ternary; embeddings, head, norms, routers and tied weights stay."""

    def __init__(self, options: Ternary) -> None:
        self.options, self.stage = options, Stage()
        self.name = "bitnet" if isinstance(options, Bitnet) else "ternary"
        self.form = Form(
            method=options.method,
            granularity={"group": options.group_size}.get(options.granularity, options.granularity),
            integers=self.name == "bitnet",
            clipped=options.estimator == "clipped",
        )

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Put a `TernaryLinear` around the weight of each layer taken, in place. A second time nothing is left to do.

        Raises `model-target` where an entry of `skip_modules` names no module, `part-unsupported` where no layer is
        taken or the model is quantized already, `NAME:nonfinite-weight` where a weight holds NaN or infinity.
        """
        self._check_unquantized(model)
        held, chosen = find_layers(model), self._chosen(model)
        if not chosen and not held:
            problem = f"quantizer '{self.name}' finds no linear layer"
            raise LuthierError("part-unsupported", problem, where=type(model).__name__)
        if context.has_values:
            for path, layer in chosen.items():
                self._check_finite(path, layer)
        for layer in held.values():
            self.stage = layer.stage
        made: dict[int, TernaryLinear] = {}  # a layer used in two places stays one layer
        for path, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = TernaryLinear(cast("nn.Linear | Conv1D", layer), self.form, self.stage)
            model.set_submodule(path, made[id(layer)])
        count = sum(layer.weight.numel() for layer in made.values())
        exact = sum(parameter.numel() for parameter in model.parameters()) - count
        log.info(f"prepared for {self.name}", layers=len(made), weights=count, left_exact=exact)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, TernaryLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Make a weight [out, in] the latent one of a layer of ours."""
        if not isinstance(layer, TernaryLinear):
            problem = f"not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def progressed(self, progress: Progress) -> Multipliers:
        """Set how far the layers are on their way. In the second stage the rate falls and weights decay no longer."""
        self.stage.share = self.options.schedule.share(progress)
        start, rate = self.options.second_stage_start, self.options.second_stage_lr
        if start is None or not progress.total_steps or progress.step < start * progress.total_steps:
            return Multipliers()
        return Multipliers(lr=rate, weight_decay=0.0)

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
        routers = {path for path in paths if path.rpartition(".")[2] in ROUTERS}
        return (heads | routers).union(*(self._within(entry, paths) for entry in self.options.skip_modules))

    def _within(self, entry: str, paths: list[str]) -> set[str]:
        """The modules that an entry of `skip_modules` names, by whole parts of their path, and all inside them."""
        found = {path for path in paths if path and f".{entry}." in f".{path}."}
        if not found:
            near = difflib.get_close_matches(entry, {p for path in paths for p in (path, *path.split("."))} - {""})
            remedy = f"Near misses: {', '.join(near)}." if near else "Print the model to see the names of its modules."
            where = f"{self.name}.skip_modules"
            raise LuthierError("model-target", f"{entry!r} names no module", where=where, remedy=remedy)
        return found

    def _check_finite(self, path: str, layer: Any) -> None:
        if not torch.isfinite(layer.weight).all():
            remedy = "Check the checkpoint, or leave the layer exact with skip_modules."
            raise LuthierError(
                f"{self.name}:nonfinite-weight", "a weight is NaN or infinite", where=path, remedy=remedy
            )

    def _check_unquantized(self, model: nn.Module) -> None:
        found = getattr(getattr(model, "config", None), "quantization_config", None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
            problem = f"quantizer '{self.name}' needs dense weights, and the checkpoint is quantized already"
            remedy = "Begin from the checkpoint that it was made of."
            raise LuthierError("part-unsupported", problem, found=str(getattr(method, "value", method)), remedy=remedy)


def find_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """Return the ternary layers of a model by their path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
