"""The operations in plain torch: what every implementation must equal, in values and by autograd in gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[..., H]: each row over its root mean square, times weight + offset; computed in float32 or better.

    `rounded` (Llama): the row returns to x's dtype before it is multiplied; else (Gemma) after. `dtype`: the result's;
    None: what that gives. Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    row = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scale = weight + offset if offset else weight
    result = row.to(x.dtype) * scale if rounded else (row * scale.to(row.dtype)).to(x.dtype)
    return result if dtype is None else result.to(dtype)


def add_rms_norm(
    x: Tensor,  # [..., H]
    residual: Tensor | None,  # [..., H]; None: nothing is added
    weight: Tensor,  # [H]
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + residual, its `rms_norm`), so that one pass gives both, and both gradients."""
    total = x if residual is None else x + residual
    return total, rms_norm(total, weight, eps, offset, rounded, dtype)


def rope(
    query: Tensor,  # [B, heads, T, D]
    key: Tensor,  # [B, key-value heads, T, D]
    cos: Tensor,  # [B, T, D]
    sin: Tensor,  # [B, T, D]
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Query and key turned by their positions' angles, halves of a head paired as Llama pairs them.

    `dtype`: the results'; None: what torch promotes to. Su et al. 2021, arXiv 2104.09864.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (query * cos + _half_turn(query) * sin, key * cos + _half_turn(key) * sin)
    return turned if dtype is None else (turned[0].to(dtype), turned[1].to(dtype))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """[..., F]: silu(gate) * up. Shazeer 2020, arXiv 2002.05202."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """[..., F]: gelu(gate) * up, gelu by its tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return F.gelu(gate, approximate="tanh") * up


def _half_turn(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
