"""Evenly spaced levels: codes q from `low` to `high` stand for (q - zero) * scale. Their gradients."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from luthier_bitnet.uniform.observers import Range

SMALLEST = 1e-8


@attrs.frozen(kw_only=True)
class Levels:
    """The codes of a number of bits. With `signs` there is no code 0."""

    low: int
    high: int
    symmetric: bool
    signs: bool = False

    @classmethod
    def of(cls, bits: float, symmetric: bool) -> Levels:
        if bits in (1, 1.58):
            return cls(low=-1, high=1, symmetric=True, signs=bits == 1)
        half = 1 << (int(bits) - 1)
        return (
            cls(low=-half, high=half - 1, symmetric=True)
            if symmetric
            else cls(low=0, high=2 * half - 1, symmetric=False)
        )

    def lay(self, around: Range) -> tuple[Tensor, Tensor]:
        """Return scale and zero of the levels that cover a range."""
        if self.symmetric:
            scale = (torch.maximum(around.high, -around.low) / self.high).clamp(min=SMALLEST)
            return scale, torch.zeros_like(scale)
        low, high = around.low.clamp(max=0), around.high.clamp(min=0)  # so that 0 is a level
        scale = ((high - low) / (self.high - self.low)).clamp(min=SMALLEST)
        return scale, (self.low - low / scale).round()

    def encode(self, steps: Tensor) -> Tensor:
        """Return the codes of values that are given in steps (value / scale), as floats."""
        return (
            torch.where(steps < 0, -1.0, 1.0).to(steps.dtype)
            if self.signs
            else steps.round().clamp(self.low, self.high)
        )


@attrs.frozen(kw_only=True)
class Estimator:
    """The derivative that replaces that of rounding: `straight_through`, `clipped`, or `soft` with a temperature."""

    kind: str = "straight_through"
    temperature: float = 4.0

    def slope(self, steps: Tensor, levels: Levels) -> Tensor:
        """Return the derivative of codes by values that are given in steps."""
        if self.kind == "straight_through":
            return torch.ones_like(steps)
        inside = ((steps >= levels.low) & (steps <= levels.high)).to(steps.dtype)
        if self.kind == "clipped":
            return inside
        # between two codes a step of tanh around the middle; its ends meet those of its neighbours
        half = torch.tanh(steps.new_tensor(self.temperature / 2))
        away = torch.zeros_like(steps) if levels.signs else steps.floor() + 0.5
        bend = torch.tanh(self.temperature * (steps - away))
        return inside * self.temperature * (1 - bend.square()) / (2 * half)


def quantize_values(values: Tensor, scale: Tensor, zero: Tensor, levels: Levels, estimator: Estimator) -> Tensor:
    """Return the level nearest to each value, with the estimator's gradient, and LSQ's for `scale`.

    `scale` and `zero` broadcast over the values. The gradient of a scale is, for each value, code - value / scale
    between the outermost levels, and the code outside them (LSQ, Esser et al., arXiv 1902.08153).
    """
    result: Tensor = _Quantize.apply(values, scale, zero, levels, estimator)
    return result


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero: Tensor, levels: Levels, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(values, scale, zero)
        ctx.levels, ctx.estimator = levels, estimator
        return (levels.encode(values / scale + zero) - zero) * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        values, scale, zero = ctx.saved_tensors
        steps = values / scale + zero
        to_values = gradient * ctx.estimator.slope(steps, ctx.levels) if ctx.needs_input_grad[0] else None
        to_scale = None
        if ctx.needs_input_grad[1]:
            inside = (steps >= ctx.levels.low) & (steps <= ctx.levels.high)
            own = ctx.levels.encode(steps) - zero - torch.where(inside, steps - zero, torch.zeros_like(steps))
            to_scale = (gradient * own).sum_to_size(scale.shape)
        return to_values, to_scale, None, None, None
