"""The arithmetic that the optimizer steps share: rates, 8-bit moments, stochastic rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.gpu import jit, tl

BLOCK = 256


class Rates(NamedTuple):
    """The numbers of one step, which computes p = p * decay - size * m / (sqrt(v) / root + eps)."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    size: float
    root: float

    @classmethod
    def at_step(cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Rates:
        """Return the rates of step `step` (from 1)."""
        beta1, beta2 = betas
        root = (1 - beta2**step) ** 0.5
        return cls(beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step), root)


def update_values(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameter and moments after the step, in plain torch and the dtype of the tensors."""
    m = rates.beta1 * m + (1 - rates.beta1) * g
    v = rates.beta2 * v + (1 - rates.beta2) * (g * g)
    return p * rates.decay - rates.size * (m / (v.sqrt() / rates.root + rates.eps)), m, v


def decode_moments(codes: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the flat moments: sign(c) (c / 127)^4 and (c / 255)^8, times the largest of each block of 256."""
    (mc, vc), dtype = codes, scales[0].dtype
    ms, vs = (scale.repeat_interleave(BLOCK)[: mc.numel()] for scale in scales)
    a, b = mc.to(dtype) / 127, vc.to(dtype) / 255
    return a.abs().pow(4).copysign(a) * ms, b.pow(8) * vs


def encode_moments(m: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ((int8, uint8) codes, (first, second) scales). Rounding the second up keeps steps short enough."""
    padded = [F.pad(moment, (0, -m.numel() % BLOCK)).view(-1, BLOCK) for moment in (m, v)]
    ms, vs = (moment.abs().amax(1) for moment in padded)
    a, b = (moment.abs() / torch.where(s > 0, s, 1)[:, None] for moment, s in zip(padded, (ms, vs), strict=True))
    mc = (a.sqrt().sqrt() * 127).round().copysign(padded[0]).to(torch.int8)
    vc = (b.sqrt().sqrt().sqrt() * 255).ceil().clamp(max=255).to(torch.uint8)
    return (mc.view(-1)[: m.numel()], vc.view(-1)[: m.numel()]), (ms, vs)


def round_values(values: Tensor, dtype: torch.dtype, key: int | None) -> Tensor:
    """Return float32 values rounded to `dtype`, with a key stochastically.

    A value is then rounded up with a probability equal to its distance from the lower bfloat16, so that the mean is
    right. The random number depends only on the key and the index of the element in the flattened tensor.
    """
    if key is None or dtype is not torch.bfloat16:
        return values.to(dtype)
    place = torch.arange(values.numel(), device=values.device, dtype=torch.int64)
    bits = values.contiguous().view(torch.int32).to(torch.int64).view(-1) & 0xFFFFFFFF
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = torch.where(finite, bits + (mix_numbers(place, key) & 0xFFFF), bits) >> 16 & 0xFFFF
    return torch.where(rounded > 32767, rounded - 65536, rounded).to(torch.int16).view(torch.bfloat16).view_as(values)


def mix_numbers(place: Tensor, key: int) -> Tensor:
    """Return 32 random bits, as int64, that are a function of index and key (the hash lowbias32)."""
    x = place * 0x9E3779B1 + key & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


@jit
def rounded_at_random(value: Any, place: Any, key: Any) -> Any:
    """Return, inside a kernel, float32 values rounded stochastically to 16 bits."""
    x = place.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    bits = value.to(tl.uint32, bitcast=True)
    added = tl.where((bits & 0x7F800000) == 0x7F800000, bits, bits + (x & 0xFFFF))
    return (added & 0xFFFF0000).to(tl.float32, bitcast=True)
