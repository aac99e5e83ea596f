"""BitNet b1.58 weights: a latent weight, its ternary form by the mean magnitude, and a straight-through gradient.

Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764, eq. 1 to 3. Activations stay as they are, so that the model can be
merged into a dense one. The ternary form is drawn in gradually: `share` goes from 0 to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from luthier import Context, LuthierError, Multipliers, Progress
from torch import Tensor, nn
from torch.nn import functional as F

from luthier_outside_ternary import Ternary


class StraightThrough(torch.autograd.Function):
    """A latent weight on its way to -s, 0 and s; exactly these where `share` is 1."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, share: Tensor) -> Tensor:
        latent = weight.float()
        scale = latent.abs().mean().clamp_min(1e-5)
        ternary = (latent / scale).round().clamp(-1, 1) * scale
        return latent.lerp(ternary, share).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class TernaryLinear(nn.Module):
    """A linear layer with a latent `weight` [out, in]; `share` of the way from there to its ternary form it computes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("share", torch.zeros((), device=layer.weight.device), persistent=False)
        self.train(layer.training)

    def effective(self) -> Tensor:
        """Return the weight that the layer computes with; its gradient is the latent weight's."""
        return StraightThrough.apply(self.weight, self.share)

    def forward(self, states: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(states, self.effective(), self.bias)


class TernaryQuantizer:
    """The `nn.Linear` layers of a model but its output head."""

    def __init__(self, options: Ternary) -> None:
        self.options = options
        self.layers: list[TernaryLinear] = []

    def apply(self, model: Any, context: Context) -> Any:
        head = model.get_output_embeddings()
        chosen = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
        for name, layer in chosen.items():
            model.set_submodule(name, TernaryLinear(layer))
        self.layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
        if not self.layers:
            raise LuthierError("part-unsupported", "the model has no nn.Linear", where=type(model).__name__)
        return model

    def dequantize(self, layer: Any) -> Tensor | None:
        return layer.effective().detach().float() if isinstance(layer, TernaryLinear) else None

    @torch.no_grad()
    def requantize(self, layer: TernaryLinear, weight: Tensor) -> None:
        layer.weight.copy_(weight)

    @torch.no_grad()
    def progressed(self, progress: Progress) -> Multipliers:
        """Draw the weights to their ternary form; a run without a known end has them so from the first step."""
        done = progress.step / progress.total_steps if progress.total_steps else 1.0
        share = min(done / self.options.ramp, 1.0) if self.options.ramp else 1.0
        for layer in self.layers:
            layer.share.fill_(share)
        return Multipliers(weight_decay=1.0 if done < self.options.decay_until else 0.0)
