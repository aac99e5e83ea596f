"""Dense copies: a model in plain layers with its adapter merged, and what rounding leaves of the update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.step.context import ContextSources, context_for, dense_weight

LOW: Final = (torch.bfloat16, torch.float16)
LEAST_KEPT: Final = 0.5  # the share of an update that must remain after rounding

Weigh = Callable[[nn.Module], Tensor]  # returns a layer's weight [out, in] in float32


@attrs.frozen(kw_only=True, eq=False)
class DenseCopy:
    """A merged copy. `changed` maps each layer with an update to the live layer that the update was added to.

    `narrow` holds the dtype of each of the base's parameters that is in full precision here until the copy is rounded.
    """

    model: Any
    changed: dict[str, nn.Module]
    narrow: dict[str, torch.dtype]
    weigh: Callable[[str, nn.Module], Tensor]  # returns the base's weight [out, in] for a path, as the copy has it

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round what is in full precision to the base's own dtype, if the files will have that dtype."""
        for name, own in self.narrow.items():
            if own is dtype:
                parameter = self.model.get_parameter(name)
                parameter.data = parameter.data.to(own)

    def measure_kept(self, dtype: torch.dtype) -> float | None:
        """Return the share of the update that remains once base and sum are rounded to a dtype; None without an update.

        It is the projection of the difference of the rounded weights on the update: about 1 if rounding only adds
        noise, 0 if every weight is rounded back to the base's.
        """
        remaining = whole = 0.0
        for base, merged in self._pairs():
            update = merged - base
            left = merged.to(dtype).to(update.dtype) - base.to(dtype).to(update.dtype)
            remaining += float((left * update).sum(dtype=torch.float64))
            whole += float(update.square().sum(dtype=torch.float64))
        return remaining / whole if whole else None

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weight [out, in] of each changed layer in the base, and in the copy."""
        for path, live in self.changed.items():
            yield self.weigh(path, live), _weight_of(self.model.get_submodule(path))


def check_kept(dense: DenseCopy, dtype: torch.dtype) -> float | None:
    """Return `measure_kept`. Raises `artifact-unmergeable` if rounding would erase most of the update."""
    share_kept = dense.measure_kept(dtype)
    if share_kept is not None and share_kept < LEAST_KEPT:
        name = str(dtype).removeprefix("torch.")
        problem = f"rounding to {name} would leave {max(share_kept, 0.0):.0%} of the update"
        remedy = "Merge with save_dtype: float32 (--save-dtype float32), or keep the adapter apart."
        raise LuthierError("artifact-unmergeable", problem, where="save_dtype", found=name, remedy=remedy)
    return share_kept


def merged_copy(model: Any, adapter: Adapter, quantizer: Quantizer) -> Any:
    """Return a copy of the model in plain dense layers of its own dtype, with the adapter merged."""
    dense = make_dense(model, adapter, quantizer)
    dense.round_weights(model.dtype)
    return dense.model


def make_dense(model: Any, adapter: Adapter, quantizer: Quantizer, original: Weigh | None = None) -> DenseCopy:
    """Copy the model in dense layers with the adapter merged, in float32 where there is an update.

    Quantized layers get their dequantized weights, or those that `original` reads. The live model stays unchanged.
    """
    live = model
    model, adapter = copy.deepcopy((model, adapter))
    plain = plain_skeleton(model)

    def weigh(path: str, layer: nn.Module) -> Tensor:
        if original is None or quantizer.dequantize(layer) is None:
            return dense_weight(layer, quantizer)
        weight = original(layer)
        return weight.T if _is_turned(plain.get_submodule(path)) else weight

    narrow = _replace_quantized(model, live, quantizer, plain, weigh)
    changed = {path: live.get_submodule(inner) for path, inner in _adapted_layers(model, plain)}
    narrow |= _widen(model, plain)
    context = context_for(model, quantizer, ContextSources(purpose="open", seed=0, original=_no_original))
    merged = model if adapter is None else adapter.merge(context)
    for path, layer in plain.named_modules():
        linear = merged.get_submodule(path) if _is_turned(layer) else None
        if isinstance(linear, nn.Linear):
            _replace(merged, path, _transposed(linear, layer))
    if any(p.is_floating_point() and not torch.isfinite(p).all() for p in merged.parameters()):
        raise LuthierError("artifact-unmergeable", "the merged weights hold NaN or infinity")
    if getattr(merged.config, "quantization_config", None) is not None:
        del merged.config.quantization_config  # of the checkpoint, whose layers are dense here
    narrow = {name: dtype for name, dtype in narrow.items() if dtype in LOW}
    return DenseCopy(model=merged, changed=changed, narrow=narrow, weigh=weigh)


def _replace_quantized(
    model: Any, live: nn.Module, quantizer: Quantizer, plain: nn.Module, weigh: Callable[[str, nn.Module], Tensor]
) -> dict[str, torch.dtype]:
    """Replace each quantized layer by a dense one. Return the model's dtype by the name of each such weight."""
    made = {}
    for path, layer in list(model.named_modules()):
        if quantizer.dequantize(layer) is not None:
            place = _plain_path(path, plain)
            weight = weigh(place, live.get_submodule(path))
            _replace(model, path, _linear(weight, getattr(layer, "bias", None), model.dtype))
            made[f"{place}.weight"] = model.dtype
    return made


def _adapted_layers(model: nn.Module, plain: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the path of each wrapped layer, and of the layer with a weight, of the model's own class, inside it."""
    for path, layer in plain.named_modules():
        wrapper: Any = model.get_submodule(path)
        if type(wrapper) is type(layer) or not isinstance(getattr(layer, "weight", None), Tensor):
            continue
        shape = sorted(layer.weight.shape)  # a Conv1D's weight, once it was quantized, is transposed
        inside = ((name, m) for name, m in wrapper.named_modules(prefix=path) if type(m) in (type(layer), nn.Linear))
        inner = next((name for name, m in inside if sorted(m.weight.shape) == shape), None)
        if inner is not None:
            yield path, inner


def _plain_path(path: str, plain: nn.Module) -> str:
    """Return the path at which the plain model has the layer that a wrapper holds at `path`."""
    names = {name for name, _ in plain.named_modules()}
    while path not in names:
        path = path.rpartition(".")[0]
    return path


def _widen(model: nn.Module, plain: nn.Module) -> dict[str, torch.dtype]:
    """Convert wrapped weights to float32, so that the sum is rounded once. Return their original dtypes."""
    narrow = {}
    for path, inner in _adapted_layers(model, plain):
        weight: Any = model.get_submodule(inner).weight
        if weight.dtype in LOW:
            narrow[f"{path}.weight"] = weight.dtype
            weight.data = weight.data.float()
    return narrow


def _weight_of(layer: nn.Module) -> Tensor:
    """Return the weight [out, in] of a dense layer, in float32 or wider."""
    dense: Any = layer
    weight = dense.weight.detach()
    weight = weight.T if _is_turned(layer) else weight
    return weight.to(torch.promote_types(torch.float32, weight.dtype))


def _is_turned(layer: nn.Module) -> bool:
    """Return True for transformers' Conv1D, which stores [in, out]."""
    return type(layer).__name__ == "Conv1D"


def plain_skeleton(model: Any) -> nn.Module:
    """Return a model of the same class and config in plain dense layers without numbers."""
    with torch.device("meta"):
        return type(model)(model.config)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Return a dense layer with a bias in this dtype, and a weight that is not yet rounded to it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=dtype)
    layer.weight = nn.Parameter(weight.to(torch.promote_types(dtype, torch.float32)))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype))
    return layer.requires_grad_(False)


def _transposed(layer: nn.Linear, pattern: nn.Module) -> nn.Module:
    """Return a Linear as the Conv1D that the architecture has in its place."""
    make: Any = type(pattern)
    made = make(layer.weight.shape[0], layer.weight.shape[1])
    with torch.no_grad():
        made.weight = nn.Parameter(layer.weight.T.contiguous())
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias)
    return made


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _no_original(layer: nn.Module) -> torch.Tensor:
    raise LuthierError("artifact-unmergeable", "this adapter needs the original weights, which are not available here")
