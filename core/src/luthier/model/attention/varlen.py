"""Attention on CUDA: all documents in one call of torch's variable-length kernel, or of flash-attn's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from luthier.model.attention.document_masks import Document
from luthier.model.attention.score_blocks import Rule


@attrs.frozen(kw_only=True)
class Kernel:
    """A function over [tokens, heads, d] with cumulative lengths, and the names of its parameters, which drift."""

    function: Callable[..., Any]
    parameters: frozenset[str]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Kernel:
        return cls(function=function, parameters=frozenset(inspect.signature(function).parameters))

    def arguments(self, rule: Rule, dropout: float, *, grouped: bool) -> dict[str, Any] | None:
        """Return the arguments for causal attention under a rule; None where this function has none for it."""
        own = self.parameters
        asked: dict[str, Any] = {}
        if "causal" in own:
            asked["causal"] = True
        if "window_size" in own:  # a window of w is w - 1 tokens to the left
            asked["window_size"] = (-1 if rule.window is None else rule.window - 1, 0)
        elif "is_causal" in own and rule.window is None:
            asked["is_causal"] = True
        elif "causal" not in own or rule.window is not None:
            return None
        scale = next((n for n in ("scale", "softmax_scale") if n in own), None)
        wanted = [(scale, rule.scale), ("softcap", rule.cap), ("dropout_p", dropout or None)]
        if any(value is not None and name not in own for name, value in wanted):
            return None
        asked |= {name: value for name, value in wanted if name is not None and value is not None}
        return {**asked, "enable_gqa": True} if grouped and "enable_gqa" in own else asked


def torch_kernel() -> Kernel | None:
    """torch's own, from 2.10 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return Kernel.of(varlen_attn)


def flash_kernel() -> Kernel | None:
    """Return the one of the package flash-attn."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return Kernel.of(flash_attn_varlen_func)


def flash_obstacle(query: Tensor, value: Tensor) -> str | None:
    """Return why no flash kernel takes these tensors."""
    if query.device.type != "cuda":
        return f"there is none for {query.device.type}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"there is none for {query.dtype}"
    size = query.shape[-1]
    if size > 256 or size % 8 or value.shape[-1] != size:
        return f"there is none for heads of {size} and {value.shape[-1]}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "this GPU is older than they need"
    return None


@attrs.frozen(kw_only=True)
class Kernels:
    """The kernels that take all documents at once, None for one that is not installed, and what they cannot take."""

    torch: Kernel | None = None
    flash: Kernel | None = None
    find_obstacle: Callable[[Tensor, Tensor], str | None] = flash_obstacle  # called with a query and a value


@functools.cache
def installed_kernels() -> Kernels:
    """Return the kernels of this installation."""
    return Kernels(torch=torch_kernel(), flash=flash_kernel())


def attend_at_once(
    kernel: Kernel,
    asked: dict[str, Any],
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, key heads, N + T, d], with N keys of a prefix
    value: Tensor,
    documents: tuple[Document, ...],
) -> Tensor:
    """Return [1, T, heads, d] from one call. The prefix and what a document continues are put before its own keys."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, d]
    if any(d.known for d in documents):
        order = torch.cat([torch.arange(start, stop) for d in documents for start, stop in d.spans]).to(q.device)
        k, v = k[order], v[order]
    if q.shape[1] != k.shape[1] and "enable_gqa" not in asked and not _groups_itself(kernel):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    queries, keys = ([d.length for d in documents], [d.known + d.length for d in documents])
    starts = (_starts(queries, q.device), _starts(keys, q.device))
    return kernel.function(q, k, v, *starts, max(queries), max(keys), **asked)[None]


def _groups_itself(kernel: Kernel) -> bool:
    """flash-attn takes fewer key heads without being told."""
    return "causal" in kernel.parameters


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    """Return [D + 1] int32."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
