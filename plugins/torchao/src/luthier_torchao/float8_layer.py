"""The linear layer that multiplies in float8 while it trains, and exactly in evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from luthier_torchao.library import (
    GRADIENT,
    INPUT,
    LEFT_EXACT,
    WEIGHT,
    Float8Config,
    Product,
    Products,
    round_dynamic,
    scaled_axis,
)

SIDES = 16  # float8 products of a GPU take only weights whose sides this number divides


@attrs.frozen(kw_only=True, eq=False)
class Rounding:
    """How the operands of a layer's three products are rounded: torchao's settings, and its form of a product."""

    config: Any
    products: Any

    @classmethod
    def of(cls, recipe_name: str, emulate: bool) -> Rounding:
        """Return torchao's recipe. Inner sides are padded, as a packed batch has any number of tokens."""
        named = Float8Config.from_recipe_name(recipe_name)
        config = dataclasses.replace(named, emulate=emulate, pad_inner_dim=True)
        gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
        products = Products(*(Product(emulate, gemm.use_fast_accum, False, True) for gemm in gemms))
        return cls(config=config, products=products)

    def round(self, values: Tensor, operand: str, role: Any, axis: int) -> Tensor:
        """Return values [n, m] in float8. By rows, the numbers along `axis` share a scale."""
        cast_config = getattr(self.config, f"cast_config_{operand}")
        if cast_config.scaling_type is LEFT_EXACT:
            return values
        granularity = cast_config.scaling_granularity
        rounded: Tensor = round_dynamic(
            values,
            cast_config.target_dtype,
            self.products,
            gemm_input_role=role,
            scaling_granularity=granularity,
            axiswise_dim=scaled_axis(axis, granularity),
            round_scales_to_power_of_2=self.config.round_scales_to_power_of_2,
        )
        return rounded


class Float8TrainingLinear(nn.Module):
    """A linear layer with an exact `weight` [out, in], or [in, out] if it replaces transformers' Conv1D."""

    def __init__(self, layer: nn.Linear | Conv1D, rounding: Rounding) -> None:
        super().__init__()
        self.transposed, self.rounding = isinstance(layer, Conv1D), rounding
        self.weight: nn.Parameter = cast(nn.Parameter, layer.weight)  # Conv1D's is a parameter too
        self.bias: nn.Parameter | None
        self.register_parameter("bias", layer.bias)
        self.out_features, self.in_features = self.plain().shape
        self.train(layer.training)

    def plain(self) -> Tensor:
        """Return the weight [out, in] itself, with its gradient."""
        return self.weight.T if self.transposed else self.weight

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Set the weight [out, in]."""
        self.plain().copy_(weight)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        if not self.training or not states.numel():
            return F.linear(states, self.plain(), self.bias)
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))
        flat = states.reshape(-1, self.in_features)
        output = multiply_float8(flat, self.plain().T, self.rounding)
        output = output.view(*states.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, float8"


def multiply_float8(states: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
    """Return the product [T, out] of states [T, in] and a weight [in, out], in the dtype of the states."""
    output: Tensor = _Products.apply(states, weight, rounding)
    return output


class _Products(torch.autograd.Function):
    """The products of states [T, in] and a weight [in, out] as torchao computes them, without those nobody asks for."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        ctx.rounding = rounding
        with torch.autocast(states.device.type, enabled=False):
            return rounding.round(states, "input", INPUT, -1) @ rounding.round(weight, "weight", WEIGHT, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (states, weight), rounding = ctx.saved_tensors, ctx.rounding
        grad_states = grad_weight = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                turned = rounding.round(weight, "weight_for_grad_input", WEIGHT, -1).t()
                grad_states = rounding.round(gradient, "grad_output", GRADIENT, -1) @ turned
            if states is not None:
                left = rounding.round(gradient, "grad_output_for_grad_weight", GRADIENT, 0).t()
                grad_weight = (left @ rounding.round(states, "input_for_grad_weight", INPUT, 0)).t().to(weight.dtype)
        return grad_states, grad_weight, None
