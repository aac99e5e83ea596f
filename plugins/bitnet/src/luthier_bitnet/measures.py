"""What rounding does to a layer: its error, and how its codes are spread."""

from __future__ import annotations

import math

import torch

from luthier_bitnet.layer import TernaryLinear


@torch.no_grad()
def measure_layer(layer: TernaryLinear) -> dict[str, float]:
    """Return `mse`, `sqnr` (decibels), `cosine`, `zeros` (share of codes) and `clipped` (share above 1.5 scales)."""
    latent, codes = layer.latent().float(), layer.rounded()[0]
    dense = layer.dense()
    error = (dense - latent).square().mean().item()
    power = latent.square().mean().item()
    cosine = torch.nn.functional.cosine_similarity(dense.flatten(), latent.flatten(), dim=0).item()
    scales = dense.abs().amax()
    return {
        "mse": error,
        "sqnr": 10 * math.log10(power / error) if error and power else math.inf,
        "cosine": cosine,
        "zeros": (codes == 0).float().mean().item(),
        "clipped": (latent.abs() > 1.5 * scales).float().mean().item(),
    }
