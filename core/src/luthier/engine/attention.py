"""Attention over packed documents, given to transformers through its own registries under the name `luthier`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.engine.batch import Batch

NAME: Final = "luthier"
FORBIDDEN: Final = ("s_aux", "position_bias", "head_mask", "alibi")  # terms of the scores that are not computed here


def document_arguments(batch: Batch) -> dict[str, Any]:
    """What tells a transformers model, and through it `attend`, where the documents are."""
    starts = batch.document_starts.to(torch.int32)
    longest = int(batch.lengths.max()) if batch.num_documents else 0
    told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return told if int(batch.continues.max()) < 0 else {**told, "continues": batch.continues}


def attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head]
    key: Tensor,  # [1, key-value heads, T, head]
    value: Tensor,  # [1, key-value heads, T, head]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: [1, T, heads, head]. Raises where it is not told the documents."""
    starts = _starts(query, key, attention_mask, told)
    continues = told.get("continues")
    pieces: list[Tensor] = []
    for d in range(len(starts) - 1):
        own = slice(starts[d], starts[d + 1])
        keys, values = key[:, :, own], value[:, :, own]
        parent = -1 if continues is None else int(continues[d])
        while parent >= 0:
            before = slice(starts[parent], starts[parent + 1])
            keys, values = torch.cat([key[:, :, before], keys], 2), torch.cat([value[:, :, before], values], 2)
            parent = int(continues[parent])  # type: ignore[index]
        pieces.append(_causal(query[:, :, own], keys, values, dropout, scaling, sliding_window, softcap))
    return torch.cat(pieces, 2).transpose(1, 2), None


def _starts(query: Tensor, key: Tensor, mask: Tensor | None, told: dict[str, Any]) -> list[int]:
    starts = told.get("cu_seq_lens_q")
    if starts is None or mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise LuthierError(
            "model-architecture",
            "packed attention was not told the documents, or got a mask, a cache or a padded batch",
            remedy="Switch to sdpa for generation; an architecture that passes no arguments on cannot be trained.",
        )
    unknown = [name for name in FORBIDDEN if told.get(name) is not None]
    if unknown:
        raise LuthierError("model-architecture", f"packed attention does not compute {', '.join(unknown)}")
    return starts.tolist()


def _causal(
    q: Tensor,  # [1, heads, L, head]
    k: Tensor,  # [1, key-value heads, P + L, head]
    v: Tensor,
    dropout: float,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[1, heads, L, head]: the last L of P + L positions attend to what stands at or before them."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    length, total = q.shape[2], k.shape[2]
    windowed = window is not None and window < total
    if softcap is None and not windowed and length == total:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=length > 1, scale=scale)
    allowed = _allowed(length, total, window if windowed else None, q.device)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~allowed, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(torch.float32, q.dtype)).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def _allowed(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """[L, P + L] bool; a window of w sees the token itself and w - 1 before it, as in transformers."""
    here = torch.arange(total - length, total, device=device)[:, None]
    there = torch.arange(total, device=device)[None]
    return (there <= here) if window is None else (there <= here) & (there > here - window)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def install(model: nn.Module) -> str:
    """Give the model packed attention, on its own copy of the config; returns the implementation it had before."""
    before = model.config._attn_implementation
    _own_config(model)
    model.set_attn_implementation(NAME)
    return before


def _own_config(model: nn.Module) -> None:
    """The attention choice lives on the config, which another model of the caller's may share."""
    copies: dict[int, Any] = {}
    fresh = copy.deepcopy(model.config)
    for name, value in vars(model.config).items():
        if hasattr(value, "to_dict"):
            copies[id(value)] = getattr(fresh, name)
    copies[id(model.config)] = fresh
    for module in model.modules():
        own = copies.get(id(getattr(module, "config", None)))
        if own is not None:
            module.config = own


def ordinary(model: nn.Module) -> str:
    """The implementation with which the model generates: sdpa, or eager where it has no sdpa."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside it the model is called with packed batches."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Inside it the model generates: ordinary attention, evaluation mode, cache on."""
    before, training = model.config._attn_implementation, model.training
    if before == NAME:
        model.set_attn_implementation(ordinary(model))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if before == NAME:
            model.set_attn_implementation(NAME)
        model.train(training)
