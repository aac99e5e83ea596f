"""Measure what rounding does to a layer: the error, and the distribution of codes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from luthier_bitnet.layer import TernaryLinear
from luthier_bitnet.quantizer import find_layers
from luthier_bitnet.uniform.layer import UniformLinear
from luthier_bitnet.uniform.quantizer import find_uniform


def measure_layers(model: Any) -> dict[str, dict[str, float]]:
    """Return the measures of each layer of this package's quantizers, by path."""
    layers: dict[str, TernaryLinear | UniformLinear] = {**find_layers(model), **find_uniform(model)}
    return {path: measure_weights(layer.dense(), layer.latent().detach().float()) for path, layer in layers.items()}


@torch.no_grad()
def measure_weights(dense: Tensor, latent: Tensor) -> dict[str, float]:
    """Return `mse`, `sqnr` (decibels), `cosine`, `zeros` (share), `clipped` (share above 1.5 of the largest level)."""
    error = (dense - latent).square().mean().item()
    power = latent.square().mean().item()
    return {
        "mse": error,
        "sqnr": 10 * math.log10(power / error) if error and power else math.inf,
        "cosine": torch.nn.functional.cosine_similarity(dense.flatten(), latent.flatten(), dim=0).item(),
        "zeros": (dense == 0).float().mean().item(),
        "clipped": (latent.abs() > 1.5 * dense.abs().amax()).float().mean().item(),
    }


@torch.no_grad()
def flip_rate(before: Tensor, after: Tensor) -> float:
    """Return the share of weights whose level differs between two dense forms of a layer."""
    scales = [weight.abs().amax().clamp(min=1e-12) for weight in (before, after)]
    return float(((before / scales[0] - after / scales[1]).abs() > 1e-6).float().mean())
