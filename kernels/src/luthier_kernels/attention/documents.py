"""Causal attention within packed documents (in blocks, after FlashAttention-2, arXiv 2307.08691).

Queries are [T, heads, D], keys and values [T, key heads, D], and document d has the tokens starts[d] to starts[d + 1].
The result is [T, heads, D]. For backward the inputs, the result and one float32 number a head and token are kept. In C
the inputs are bfloat16, D is a multiple of 16 and at most 256; sums and scores are float32, and probabilities are
rounded to bfloat16 before they are multiplied by values. Products take the processor's tiles (AMX), or its vectors.
Documents and heads are computed on their own, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation

WIDEST, GRAIN = 256, 16  # head dimensions that C computes: up to the first, in multiples of the second


def attend_documents(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Return the attention [T, heads, D]; starts [documents + 1] go from 0 to T."""
    return FORWARD(query, key, value, starts, float(scale))[0]


@functools.cache
def is_fast() -> bool:
    """Return True if the C form is compiled, for a processor that multiplies bfloat16 by itself (AVX512-BF16)."""
    if not has_native("attention"):
        return False
    fast = torch.zeros(1, dtype=torch.int64)
    native_function("attention", "describe_attention")(fast)
    return bool(fast.item())


def reference_attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch, with the log-sums [heads, T] of the scores; float64 stays float64."""
    results, norms = [], []
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    for first, last in itertools.pairwise(starts.tolist()):
        q, k, v = (tensor[first:last].transpose(0, 1).to(wide) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(group, 0) for tensor in (k, v))
        unseen = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(unseen, -torch.inf)
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
        norms.append(scores.logsumexp(-1))
    return torch.cat(results).to(query.dtype), torch.cat(norms, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    given = (query, key, value, starts, scale)
    return run_first(
        "attend_documents",
        ("native", _is_native(query), lambda: _attend_native(*given)),
        ("torch", True, lambda: reference_attend(*given)),
    )


def _attend_native(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    starts, (total, heads, size) = starts.long().contiguous(), query.shape
    out, norms = torch.empty_like(query), torch.empty(heads, total)
    call, key_heads = native_function("attention", "attend_forward"), key.shape[1]

    def attend_part(start: int, end: int) -> None:
        call(query, key, value, starts, heads, key_heads, size, scale, total, start, end, out, norms)

    run_parts((len(starts) - 1) * key_heads, 1, attend_part)
    return out, norms


def _attend_back(
    gradient: Tensor, inputs: list[Tensor], result: Tensor, norms: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs, which are queries, keys and values."""
    given = (gradient, inputs, result, norms, starts, scale)
    return run_first(
        "attend_documents_back",
        ("native", _is_native(inputs[0]), lambda: _back_native(*given)),
        ("torch", True, lambda: _back_torch(*given)),
    )


def _back_native(
    gradient: Tensor, inputs: list[Tensor], result: Tensor, norms: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, ...]:
    query, key, value = (tensor.contiguous() for tensor in inputs)
    gradient, starts, (total, heads, size) = gradient.contiguous(), starts.long().contiguous(), query.shape
    made = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    call, key_heads = native_function("attention", "attend_backward"), key.shape[1]
    tensors = (gradient, query, key, value, result, norms, starts)

    def back_part(start: int, end: int) -> None:
        call(*tensors, heads, key_heads, size, scale, total, start, end, *made)

    run_parts((len(starts) - 1) * key_heads, 1, back_part)
    return made


def _back_torch(
    gradient: Tensor, inputs: list[Tensor], result: Tensor, norms: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """With p the probabilities: d score = p * (d p - the dot product of the result and its gradient)."""
    group = inputs[0].shape[1] // inputs[1].shape[1]
    made: list[list[Tensor]] = [[], [], []]
    for first, last in itertools.pairwise(starts.tolist()):
        own = (tensor[first:last].transpose(0, 1).to(norms.dtype) for tensor in (gradient, result, *inputs))
        given, out, q, k, v = own
        k, v = (tensor.repeat_interleave(group, 0) for tensor in (k, v))
        shares = (q @ k.transpose(1, 2) * scale - norms[:, first:last, None]).exp().tril()
        slopes = shares * (given @ v.transpose(1, 2) - (given * out).sum(-1, keepdim=True)) * scale
        whole = slopes @ k, slopes.transpose(1, 2) @ q, shares.transpose(1, 2) @ given  # [heads, length, D]
        for parts, part, like in zip(made, whole, inputs, strict=True):
            parts.append(part.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1))
    return tuple(torch.cat(parts).to(like.dtype) for parts, like in zip(made, inputs, strict=True))


def _is_native(query: Tensor) -> bool:
    size = query.shape[-1]
    fits = query.device.type == "cpu" and query.dtype is torch.bfloat16 and size % GRAIN == 0 and size <= WIDEST
    return fits and query.numel() > 0 and has_native("attention")


def _fake(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    norms = query.new_empty(query.shape[1::-1], dtype=torch.promote_types(query.dtype, torch.float32))
    return _empty(query), norms


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, starts)


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, result, norms, starts = ctx.saved_tensors
    return *BACKWARD(gradient, inputs, result, norms, starts, ctx.scale), None, None


BACKWARD = register_operation(
    "attend_documents_back(Tensor gradient, Tensor[] inputs, Tensor result, Tensor norms, Tensor starts, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _attend_back,
    lambda gradient, inputs, result, norms, starts, scale: tuple(map(_empty, inputs)),
)
FORWARD = register_operation(
    "attend_documents(Tensor query, Tensor key, Tensor value, Tensor starts, float scale) -> (Tensor, Tensor)",
    _attend,
    _fake,
    _save,
    _backward,
)
