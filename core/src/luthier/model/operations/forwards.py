"""The forwards that recognised modules get: the same computation by our operations, or their own where it must be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.model.operations.recognise_layers import Attention, Block, attention_heads
from luthier.model.operations.recognise_operations import Mlp, Norm, mlp_hidden
from luthier.model.operations.signatures import Operations
from luthier.precision import dtypes as precision

Forward = Callable[..., Any]
# the tensors that a model passes to its layers and that recognition has tried
CARRIED: Final = ("position_embeddings", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")


@attrs.frozen(kw_only=True)
class Layer:
    """A block with the norms that it has; `lowers`: its attention and MLP begin with products and nothing else."""

    block: Block
    first: Norm
    second: Norm
    lowers: tuple[bool, bool]


def norm_forward(operations: Operations, norm: Norm, own: Forward) -> Forward:
    form = norm.form

    def forward(module: Any, x: Tensor) -> Tensor:
        if x.dtype is torch.float64 and not norm.exact:
            return own(module, x)
        dtype = autocast_dtype(x) if is_narrowed(module) else None
        return operations.rms_norm(x, module.weight, form.eps, form.offset, form.rounded, dtype)

    return forward


def mlp_forward(operations: Operations, form: Mlp) -> Forward:
    act = operations.swiglu if form.kind == "silu" else operations.geglu

    def forward(module: Any, x: Tensor) -> Tensor:
        first = [getattr(module, name) for name in form.inputs]
        return getattr(module, form.down)(mlp_hidden(module, form, lowered(x, first), act))

    return forward


def linear_layers(model: Any) -> list[str]:
    """Return the names of the plain linear layers; the head is left out, which is computed in tiles."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]


def linear_forward(operations: Operations, own: Forward) -> Forward:
    def forward(module: Any, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        given = [x, module.weight, module.bias]
        given = given if dtype is None else [None if t is None else t.to(dtype) for t in given]
        result = operations.compute_offered("linear", *given)
        return own(module, x) if result is NotImplemented else result

    return forward


def attention_forward(operations: Operations, form: Attention, own: Forward) -> Forward:
    def forward(module: Any, hidden_states: Tensor, *args: Any, **arguments: Any) -> Any:
        if args or not is_packed(arguments) or arguments.get("position_embeddings") is None:
            return own(module, hidden_states, *args, **arguments)
        tables = arguments["position_embeddings"]
        arguments = {name: value for name, value in arguments.items() if name not in form.consumed}
        x = lowered(hidden_states, [module.q_proj, module.k_proj, module.v_proj])
        dtype = autocast_dtype(x)
        turn = functools.partial(operations.rope, dtype=dtype)
        query, key, value = attention_heads(module, form, x, turn, tables)
        attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        settings = form.settings | {"dropout": form.dropout if module.training else 0.0}
        mixed, weights = attend(module, query, key, value, None, **settings, **arguments)
        return module.o_proj(mixed.reshape(*x.shape[:-1], -1)), weights

    return forward


def layer_forward(operations: Operations, layer: Layer, own: Forward) -> Forward:
    block = layer.block

    def compute(module: Any, x: Tensor, **arguments: Any) -> Tensor:
        first, second = getattr(module, block.first_norm), getattr(module, block.second_norm)
        x, normed = _normed(operations, first, layer.first, x, None, layer.lowers[0])
        added, _ = getattr(module, block.attention)(hidden_states=normed, **arguments)
        added = added if block.multiplier == 1.0 else added * block.multiplier
        x, normed = _normed(operations, second, layer.second, x, added, layer.lowers[1])
        added = getattr(module, block.mlp)(normed)
        return x + (added if block.multiplier == 1.0 else added * block.multiplier)

    def forward(module: Any, hidden_states: Tensor, *args: Any, **arguments: Any) -> Any:
        if args or not is_packed(arguments):
            return own(module, hidden_states, *args, **arguments)
        # transformers' own checkpointing, done in its way
        if module.training and getattr(module, "gradient_checkpointing", False):
            return module._gradient_checkpointing_func(functools.partial(compute, module, **arguments), hidden_states)
        return compute(module, hidden_states, **arguments)

    return forward


def _normed(
    operations: Operations, module: Any, norm: Norm, x: Tensor, residual: Tensor | None, lowers: bool
) -> tuple[Tensor, Tensor]:
    """Return (x + residual, its norm); the norm's module is called where somebody hooked onto it."""
    if is_hooked(module) or (x.dtype is torch.float64 and not norm.exact):
        x = x if residual is None else x + residual
        return x, module(x)
    form, dtype = norm.form, autocast_dtype(x) if lowers or is_narrowed(module) else None
    return operations.add_rms_norm(x, residual, module.weight, form.eps, form.offset, form.rounded, dtype)


def is_packed(arguments: dict[str, Any]) -> bool:
    """Return True if a call is one of ours: it says where the documents are, and gives nothing that was not tried.

    A mask, a cache by any name, or an object of a plugin: then the module's own forward computes.
    """
    return arguments.get("cu_seq_lens_q") is not None and all(
        name in CARRIED or value is None or isinstance(value, (bool, int, float, str))
        for name, value in arguments.items()
    )


def is_hooked(module: nn.Module) -> bool:
    """Return True if somebody wants to see this module called; that its result is rounded can be done without."""
    before = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    after = any(hook is not precision.narrow_output for hook in module._forward_hooks.values())
    return bool(before) or after or torch.nn.modules.module._has_any_global_hook()


def is_narrowed(module: nn.Module) -> bool:
    """Return True if the precision rounds what this module returns to the dtype of products."""
    return any(hook is precision.narrow_output for hook in module._forward_hooks.values())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast would cast x to before a product; None where it would leave it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def lowered(x: Tensor, layers: list[nn.Module]) -> Tensor:
    """x as autocast would cast it for each of these layers, once for all of them."""
    dtype = autocast_dtype(x)
    return x if dtype is None or not are_products(layers) else x.to(dtype)


def are_products(layers: list[nn.Module]) -> bool:
    """Return True if all are plain linear layers, perhaps wrapped by an adapter: autocast casts what they are given."""
    return all(type(getattr(layer, "base_layer", layer)) is nn.Linear for layer in layers)
