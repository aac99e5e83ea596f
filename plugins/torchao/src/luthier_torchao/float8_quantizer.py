"""The quantizer `torchao.float8`: weights stay exact, and training multiplies in float8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from luthier import Context, LuthierError, choose_dense_layers, get_logger, replace_dense_layers
from torch import Tensor, nn

from luthier_torchao import TorchaoFloat8
from luthier_torchao.float8_layer import SIDES, Float8TrainingLinear, Rounding, multiply_float8

NAME = "torchao.float8"
log = get_logger()


class Float8Quantizer:
    """A quantizer that changes how linear layers multiply in training. Tied weights and `skip_modules` stay exact."""

    def __init__(self, options: TorchaoFloat8) -> None:
        self.options = options
        self.rounding = Rounding.of(options.recipe_name, options.emulate)

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by a `Float8TrainingLinear` with the same weight. A second call changes nothing.

        Raises what `replace_dense_layers` raises, `torchao:nonfinite-weight` if a weight holds NaN or infinity, and
        `part-unsupported` if the device that trains has no float8 products, which `emulate` goes without.
        """
        if context.purpose == "train" and not self.options.emulate:
            check_device(context.device, self.rounding)
        skipped = self.options.skip_modules
        uneven = [path for path, layer in choose_dense_layers(model, NAME, skipped).items() if _is_uneven(layer)]
        _check_even(model, skipped, uneven)
        count = replace_dense_layers(
            model, context, NAME, [*skipped, *uneven], Float8TrainingLinear,
            lambda layer: Float8TrainingLinear(layer, self.rounding), "torchao:nonfinite-weight",
        )  # fmt: skip
        if uneven:
            log.warning(
                f"layers stay exact, as {SIDES} does not divide their sizes", layers=len(uneven), first=uneven[0]
            )
        log.info(f"prepared for {NAME}", layers=count, recipe=self.options.recipe_name, emulated=self.options.emulate)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        """Return the exact weight [out, in], which nothing rounds."""
        if not isinstance(layer, Float8TrainingLinear):
            return None
        weight: Any = layer.plain().detach()
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return weight.to(torch.float32, copy=True)

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Set the weight [out, in] of a layer of this quantizer."""
        if not isinstance(layer, Float8TrainingLinear):
            problem = f"this is not a layer of quantizer '{NAME}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)


def check_device(device: torch.device, rounding: Rounding) -> None:
    """Raise `part-unsupported` if the smallest training step of one layer cannot be computed on a device."""
    if device.type == "meta":  # of a rank that waits for its weights
        return
    try:
        ones = torch.ones(SIDES, SIDES, device=device, dtype=torch.bfloat16, requires_grad=True)
        multiply_float8(ones, ones, rounding).sum().backward()
    except (RuntimeError, AssertionError) as error:  # torch's and torchao's words for it
        found = f"{device}: {next(iter(str(error).splitlines()), type(error).__name__)}"
        remedy = "Set emulate: true, which computes the same in float32 and gains no time, or use quantizer: none."
        raise LuthierError("part-unsupported", "the device cannot multiply in float8", where=NAME, found=found,
                           remedy=remedy) from error  # fmt: skip


def _check_even(model: nn.Module, skipped: Sequence[str], uneven: Sequence[str]) -> None:
    """Raise `part-unsupported` if every layer that could be replaced has a side that float8 products do not take."""
    if uneven and len(uneven) == len(choose_dense_layers(model, NAME, skipped)):
        rows, columns = model.get_submodule(uneven[0]).weight.shape  # type: ignore[misc]  # a dense layer's is a tensor
        problem = f"float8 products need sides that {SIDES} divides, and no linear layer has them"
        raise LuthierError("part-unsupported", problem, where=uneven[0], found=f"{rows} x {columns}",
                           remedy="Use quantizer: none.")  # fmt: skip


def _is_uneven(layer: Any) -> bool:
    return any(side % SIDES for side in layer.weight.shape)
