"""The operations in plain torch. Every other implementation must give the same values and gradients."""

from __future__ import annotations

import itertools

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
    """Return [..., H]: each row divided by its root mean square, times (weight + offset).

    The mean square is computed in float32 or better. With `rounded`, as in Llama, the divided row is rounded to the
    dtype of x before it is multiplied; without, as in Gemma, after. `dtype` is the dtype of the result; None leaves it
    as it is. Zhang and Sennrich 2019, arXiv 1910.07467.
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
    """Return (x + residual, its `rms_norm`), both [..., H], so that one pass computes both and their gradients."""
    total = x if residual is None else x + residual
    return total, rms_norm(total, weight, eps, offset, rounded, dtype)


def rope(
    query: Tensor,  # [B, heads, T, D]
    key: Tensor,  # [B, key-value heads, T, D]
    cos: Tensor,  # [B, T, D]
    sin: Tensor,  # [B, T, D]
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return query and key, rotated by the angles of their positions (rotary position embedding).

    Element i of a head is paired with element i + D/2, as in Llama. `dtype` is the dtype of the results; None: the one
    that torch promotes to. Su et al. 2021, arXiv 2104.09864.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (query * cos + _half_turn(query) * sin, key * cos + _half_turn(key) * sin)
    return turned if dtype is None else (turned[0].to(dtype), turned[1].to(dtype))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., F]. Shazeer 2020, arXiv 2002.05202."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) * up, [..., F], with gelu's tanh approximation.

    Hendrycks and Gimpel 2016, arXiv 1606.08415; Shazeer 2020, arXiv 2002.05202.
    """
    return F.gelu(gate, approximate="tanh") * up


def linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I]
    bias: Tensor | None = None,  # [O]
) -> Tensor:
    """Return [..., O]: x times the transposed weight, plus the bias. All have one dtype."""
    return F.linear(x, weight, bias)


def token_logprobs(
    states: Tensor,  # [S, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [S] int64
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Return the log-probability of each label, [S] in float32 or better.

    The logits are (states weight^T + bias) * `scale`. With `cap` they then become cap * tanh(logits / cap), as in
    Gemma 2.
    """
    logits = F.linear(states, weight, bias)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype)) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def document_attention(
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key-value heads, N + T, D], N keys of a prefix first
    value: Tensor,  # [1, key-value heads, N + T, D]
    document_starts: Tensor,  # [documents + 1] int64, from 0 to T
    # [documents] int64, the document that each continues, -1 for none; None: none continues another
    continues: Tensor | None,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Return softmax attention within documents, [1, T, heads, D].

    A token attends to itself and to the tokens before it in its document, and in the documents that this one continues.
    A chain of documents begins with the N keys of the prefix. Scores are query key^T * `scale`; with `cap` they become
    cap * tanh(score / cap). With `window` a token attends only to itself and the window - 1 tokens before it.
    """
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scale  # [1, heads, T, N + T]
    scores = scores.to(torch.promote_types(torch.float32, scores.dtype))
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    seen = _seen(document_starts.tolist(), continues, key.shape[2] - query.shape[2], window).to(query.device)
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (shares.to(value.dtype) @ value).transpose(1, 2)


def _seen(starts: list[int], continues: Tensor | None, prefix: int, window: int | None) -> Tensor:
    """Return [T, N + T] bool: True where a token attends to a key."""
    links = [-1] * (len(starts) - 1) if continues is None else continues.tolist()
    places = torch.arange(prefix + starts[-1])  # position of each key, counted from the start of its chain of documents
    seen = torch.zeros(starts[-1], prefix + starts[-1], dtype=torch.bool)
    seen[:, :prefix] = True
    for document, (start, stop) in enumerate(itertools.pairwise(starts)):
        parent = links[document]
        before = prefix if parent < 0 else int(places[prefix + starts[parent + 1] - 1]) + 1
        places[prefix + start : prefix + stop] = torch.arange(before, before + stop - start)
        while parent >= 0:
            seen[start:stop, prefix + starts[parent] : prefix + starts[parent + 1]] = True
            parent = links[parent]
        seen[start:stop, prefix + start : prefix + stop] = True
    own = places[prefix:, None]
    seen &= places <= own
    return seen if window is None else seen & (places > own - window)


def _half_turn(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
