"""Attention by torch's own scaled dot product, one document at a time: for every device, and for dropout."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.model.attention.document_masks import Document
from luthier.model.attention.score_blocks import Rule


def attend_singly(
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, key heads, N + T, d], with N keys of a prefix
    value: Tensor,
    documents: tuple[Document, ...],
    rule: Rule,
    dropout: float = 0.0,
) -> Tensor:
    """Return [1, T, heads, d]; keys may begin with those of a prefix."""
    lengths = [d.length for d in documents]
    prefix = key.shape[2] - query.shape[2]
    widths = [prefix, *lengths] if prefix else lengths
    # `split` gives one gradient for all documents, where each slice would give a gradient of the whole row
    queries, keys, values = query.split(lengths, 2), key.split(widths, 2), value.split(widths, 2)
    places = {start: i for i, start in enumerate(itertools.accumulate(widths, initial=0))}
    pieces = []
    for own, document in zip(queries, documents, strict=True):
        seen = [places[start] for start, _ in document.spans]
        k, v = (torch.cat([t[j] for j in seen], 2) if len(seen) > 1 else t[seen[0]] for t in (keys, values))
        pieces.append(_causal(own, k, v, rule, dropout).transpose(1, 2))
    return torch.cat(pieces, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: Rule, dropout: float) -> Tensor:
    """Return [1, heads, L, d], in which each of the last L of K + L positions attends to itself and those before it."""
    length, total = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    windowed = rule.window is not None and rule.window < total
    arguments: dict[str, Any] = {"dropout_p": dropout, "scale": rule.scale, "enable_gqa": grouped}
    if rule.cap is None and not windowed and length == total:
        return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, **arguments)
    allowed = _allowed(length, total, rule.window if windowed else None, q.device)
    if rule.cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **arguments)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    exact = torch.promote_types(torch.float32, q.dtype)
    scores = (q @ k.transpose(2, 3)).to(exact) * rule.scale
    scores = (rule.cap * torch.tanh(scores / rule.cap)).masked_fill(~allowed, float("-inf"))
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v


def _allowed(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Return [L, K + L] bool; a window of w sees the token itself and w - 1 before it, as in transformers."""
    here = torch.arange(total - length, total, device=device)[:, None]
    there = torch.arange(total, device=device)[None]
    return (there <= here) if window is None else (there <= here) & (there > here - window)
