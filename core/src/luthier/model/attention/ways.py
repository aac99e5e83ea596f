"""The attention function that transformers models call, and the ways it has to compute: which is chosen, and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.attention.document_masks import Document, aside_documents, cut_documents, make_buckets
from luthier.model.attention.plain import attend_singly
from luthier.model.attention.products import Products
from luthier.model.attention.recorded_inputs import keep_inputs
from luthier.model.attention.score_blocks import Rule
from luthier.model.attention.varlen import Kernels, attend_at_once, installed_kernels
from luthier.model.operations.signatures import active_operations

log = get_logger()

FORBIDDEN: Final = ("s_aux", "position_bias", "head_mask", "alibi")  # terms of the scores that no way here computes
Prefixes = Callable[[int], "tuple[Tensor, Tensor] | None"]  # an adapter's prefixes by layer number
PRODUCTS, TORCH, FLASH, SDPA = "products", "varlen_attn", "flash-attn", "sdpa"  # the names of the ways


@attrs.define(eq=False)
class Choice:
    """The way that one model attends, None for the preferred one, and what was said of it.

    `kernels` are those that it may use, None for the installed ones.
    """

    way: str | None = None
    kernels: Kernels | None = None
    said: set[str] = attrs.field(factory=set)


_OWN: Final[WeakKeyDictionary[nn.Module, Choice]] = WeakKeyDictionary()  # by module of a model
_ANY: Final = Choice()


def attend_documents(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head]
    key: Tensor,  # [1, key-value heads, T, head]
    value: Tensor,  # [1, key-value heads, T, head]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Return causal attention inside each document, [1, T, heads, head].

    A document sees the documents that it continues, too, and a prefix. Raises where it is not told the documents.
    """
    arguments = arguments if "cu_seq_lens_k" in arguments else {**arguments, **aside_documents()}
    starts = _known_starts(query, key, attention_mask, arguments)
    keep_inputs(module, query, key, value)
    key, value = _prefixed(module, key, value, arguments.get("prefixes"))
    continues = arguments.get("continues")
    links = None if continues is None else tuple(continues.tolist())
    documents = cut_documents(starts, links, key.shape[2] - query.shape[2])
    query, key, value = _cast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale=scale, window=_useful_window(sliding_window, documents), cap=softcap)
    offered = NotImplemented if dropout else _offered(module, (query, key, value), starts, continues, rule)
    if offered is not NotImplemented:
        return offered, None
    return _by(_OWN.get(module, _ANY), (query, key, value), documents, rule, dropout), None


def _useful_window(window: int | None, documents: tuple[Document, ...]) -> int | None:
    """Return the window if some document is longer than it, else None."""
    return window if window is not None and window < max(d.known + d.length for d in documents) else None


def _offered(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    starts: tuple[int, ...],
    continues: Tensor | None,
    rule: Rule,
) -> Any:
    """By the form that a plugin offers; NotImplemented where there is none for this call."""
    operations = active_operations(module)
    if not operations.has_offers("document_attention"):
        return NotImplemented
    starts_tensor = torch.tensor(starts, device=inputs[0].device)
    return operations.compute_offered(
        "document_attention", *inputs, starts_tensor, continues, rule.scale, rule.window, rule.cap
    )


def preferred(device: torch.device, dtype: torch.dtype, kernels: Kernels | None = None) -> tuple[str, str]:
    """Return the preferred way for a device and a dtype, and the reason. `kernels` None means the installed ones."""
    if device.type == "cpu":
        return PRODUCTS, "products over documents of like length are the fastest on a CPU"
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return SDPA, f"one document at a time: no kernel takes all of them on {device.type} in {dtype}"
    kernels = kernels or installed_kernels()
    if kernels.torch is not None:
        return TORCH, "torch's kernel takes all documents at once"
    if kernels.flash is not None:
        return FLASH, "flash-attn takes all documents at once, and this torch has no such kernel"
    return SDPA, "one document at a time: this torch has no varlen_attn, and flash-attn is not installed"


def available(way: str, device: torch.device) -> bool:
    """Return True if a way that was decided before can be had here."""
    if way in (TORCH, FLASH):
        kernel = installed_kernels().torch if way == TORCH else installed_kernels().flash
        return device.type == "cuda" and kernel is not None
    return way == SDPA or device.type == "cpu"


def decide_attention(model: nn.Module, device: torch.device, dtype: torch.dtype, decisions: Any) -> str:
    """Return the way in which a run's model attends: the one in its decisions, or else the preferred one."""
    way = decisions.take("attention", lambda: preferred(device, dtype), usable=lambda way: available(way, device))
    set_attention(model, Choice(way))
    return way


def set_attention(model: nn.Module, choice: Choice) -> None:
    """Let a model attend in one way from now on."""
    for module in model.modules():
        _OWN[module] = choice


def _by(choice: Choice, inputs: tuple[Tensor, Tensor, Tensor], documents: tuple[Document, ...], rule: Rule,
        dropout: float) -> Tensor:  # fmt: skip
    way = choice.way or preferred(inputs[0].device, inputs[0].dtype, choice.kernels)[0]
    if way == PRODUCTS and not dropout:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        return Products.apply(*inputs, make_buckets(documents), rule, keep)
    if way == PRODUCTS:
        _say(choice, "it has dropout")
    if way in (TORCH, FLASH):
        attended = _at_once(choice, inputs, documents, rule, dropout)
        if attended is not None:
            return attended
    return attend_singly(*inputs, documents, rule, dropout)


def _at_once(choice: Choice, inputs: tuple[Tensor, Tensor, Tensor], documents: tuple[Document, ...], rule: Rule,
             dropout: float) -> Tensor | None:  # fmt: skip
    """Return the first available kernel that can do it; None, which is logged, where none can."""
    kernels = choice.kernels or installed_kernels()
    reason = kernels.find_obstacle(inputs[0], inputs[2])
    if reason is None:
        grouped = inputs[0].shape[1] != inputs[1].shape[1]
        for kernel in filter(None, (kernels.torch, kernels.flash)):
            asked = kernel.arguments(rule, dropout, grouped=grouped)
            if asked is not None:
                return attend_at_once(kernel, asked, *inputs, documents)
    _say(choice, reason or "no kernel that is here computes this soft cap or dropout")
    return None


def _say(choice: Choice, reason: str) -> None:
    """Once for a model."""
    if reason not in choice.said:
        choice.said.add(reason)
        log.info("attention", way=SDPA, reason=f"one document at a time: {reason}")


def _known_starts(query: Tensor, key: Tensor, mask: Tensor | None, arguments: dict[str, Any]) -> tuple[int, ...]:
    """Return the starts [D+1] that attention was told; `model-architecture` where it cannot compute what was asked."""
    starts = arguments.get("cu_seq_lens_k")
    if starts is None or mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise LuthierError(
            "model-architecture",
            "packed attention was not told the documents, or got a mask, a cache or a padded batch",
            remedy="Switch to sdpa for generation; an architecture that passes no arguments on cannot be trained.",
        )
    unknown = [name for name in FORBIDDEN if arguments.get(name) is not None]
    if unknown:
        raise LuthierError("model-architecture", f"packed attention does not compute {', '.join(unknown)}")
    return tuple(starts.tolist())


def _prefixed(module: nn.Module, key: Tensor, value: Tensor, prefixes: Prefixes | None) -> tuple[Tensor, Tensor]:
    """Return keys and values [1, key heads, N + T, d], the prefix that an adapter has for this layer before them."""
    if prefixes is None:
        return key, value
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        problem = f"{type(module).__name__} does not say which layer it is, so that no prefix can be given to it"
        raise LuthierError("model-architecture", problem, remedy="Choose an adapter without prefixes.")
    pair = prefixes(layer)
    if pair is None:
        return key, value
    wanted = [[pair[0].shape[0], t.shape[1], t.shape[3]] for t in (key, value)]
    if [list(t.shape) for t in pair] != wanted:
        shapes = [list(t.shape) for t in pair]
        remedy = f"Return keys and values of {wanted[0]} and {wanted[1]}: rows, key-value heads, head dimension."
        raise LuthierError("part-invalid", f"prefixes({layer}) has another shape", where="adapter", found=shapes,
                           remedy=remedy)  # fmt: skip
    before = [own.to(t.dtype).transpose(0, 1)[None] for own, t in zip(pair, (key, value), strict=True)]
    return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To autocast's dtype, as torch's own attention does."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)
