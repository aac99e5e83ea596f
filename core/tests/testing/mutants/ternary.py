"""Quantizers whose latent weights are trained: one that is sound, and those that break one rule each."""

from __future__ import annotations

from typing import Any

import torch
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Multipliers
from torch import nn
from torch.nn import functional as F


class TernaryLinear(nn.Module):
    """A linear layer that computes with its latent `weight` [out, in], by `share` drawn to -s, 0 and s."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.share = layer.weight, layer.bias, 0.0

    def effective(self) -> torch.Tensor:
        scale = self.weight.detach().abs().mean().clamp_min(1e-8)
        ternary = (self.weight.detach() / scale).round().clamp(-1, 1) * scale
        return self.weight + self.share * (ternary - self.weight.detach())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.effective(), self.bias)


class Ternary(Quantizer):
    """Every linear layer but the head; the share grows with the steps done, and the rate falls."""

    layer: Any = TernaryLinear

    def __init__(self, options: Any) -> None:
        self.options, self.layers = options, []

    def apply(self, model: Any, context: Any) -> Any:
        head = model.get_output_embeddings()
        for path, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, self.layer(layer))
        self.layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
        return model

    def dequantize(self, layer: Any) -> torch.Tensor | None:
        return layer.effective().detach().float() if isinstance(layer, TernaryLinear) else None

    @torch.no_grad()
    def requantize(self, layer: Any, weight: torch.Tensor) -> None:
        layer.weight.copy_(weight)

    def progressed(self, progress: Any) -> Multipliers:
        for layer in self.layers:
            layer.share = self.share(progress)
        return Multipliers(lr=1.0 - self.share(progress) / 2)

    def share(self, progress: Any) -> float:
        return progress.step / progress.total_steps if progress.total_steps else 1.0


class CountsCalls(Ternary):
    """Its schedule counts how often it is told, an evaluation included."""

    calls = 0

    def share(self, progress):
        self.calls += 1
        return min(self.calls / 100, 1.0)


class NeverGoesBack(Ternary):
    most = 0.0

    def share(self, progress):
        self.most = max(self.most, super().share(progress))
        return self.most


class ForgetsItsRate(Ternary):
    """The rate falls by a tenth with each new step that it hears of, of which it keeps no state."""

    rate, seen = 1.0, -1

    def progressed(self, progress):
        super().progressed(progress)
        if progress.step > self.seen:
            self.rate, self.seen = 0.9 * self.rate, progress.step
        return Multipliers(lr=self.rate)


class CutsGradients(Ternary):
    """No gradient passes its rounding."""

    class layer(TernaryLinear):
        def effective(self):
            share = self.share
            return (1 - share) * self.weight + share * (super().effective() - self.weight).detach()


class LoadsNothing(Ternary):
    def load(self, folder, model):
        return model


class PicklesItself(Ternary):
    def save(self, model, folder):
        torch.save(model.state_dict(), folder / "model.pt")

    def load(self, folder, model):
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return model


class KeepsWhatIsWorse(Ternary):
    """Its first layer tries half of its weight, and keeps it without looking at the loss."""

    needs_metrics = {"tuning": "eval_loss"}

    def tune(self, metrics, evaluate):
        self.scale_first(0.5)
        evaluate()
        return metrics

    @torch.no_grad()
    def scale_first(self, factor):
        self.layers[0].weight.mul_(factor)


class LeavesATrial(KeepsWhatIsWorse):
    """Takes back what is worse, but not what it could not evaluate."""

    def tune(self, metrics, evaluate):
        super().tune(metrics, evaluate)
        self.scale_first(2.0)
        return metrics


class TriesNothing(KeepsWhatIsWorse):
    def scale_first(self, factor):
        pass
