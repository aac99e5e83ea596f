"""Stored layers: those of a checkpoint that another tool has quantized, as a base below an adapter.

The layers that transformers makes for such a checkpoint are for inference. Those of bitsandbytes change their weight's
layout on some processors at the first pass without gradient, after which none flows through them; BitNet's round
activations without one. Ours opens its weight in each pass, and again in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.model.offline_import import import_offline

BLOCK, NESTED_BLOCK = 64, 256  # block sizes of bitsandbytes' scales, if no weight states them
META: Final = torch.device("meta")  # where the weights of a model without values are imagined
LEVEL: Final = 127  # the largest int8 code of an activation
LEAST: Final = 1e-5  # the smallest magnitude by which activations are scaled


@attrs.frozen(kw_only=True)
class Form:
    """How a weight is stored: `kind` says which opener reads it, the rest is what that one needs besides tensors."""

    kind: str
    block: int = 0
    nested_block: int = 0
    rounds: bool = False  # True if activations are rounded to int8, token by token


class StoredLinear(nn.Module):
    """A linear layer over a frozen weight [out, in] as its checkpoint has packed it, in buffers; its bias is exact."""

    weight: Tensor

    def __init__(self, layer: Any, form: Form, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = layer.in_features, layer.out_features, form
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())
        bias = layer.bias
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.rms_norm: nn.Module | None = getattr(layer, "rms_norm", None)
        self.train(layer.training)

    @property
    def rounds_activations(self) -> bool:
        return self.form.rounds

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight [out, in] in float32."""
        return _OPENERS[self.form.kind](self).float()

    def forward(self, states: Tensor) -> Tensor:
        """Return the layer's result [..., out] for [..., in], in the dtype of the states or of autocast."""
        states = states if self.rms_norm is None else self.rms_norm(states)
        device = states.device.type
        if torch.is_autocast_enabled(device):
            states = states.to(torch.get_autocast_dtype(device))
        states = states + (round_tokens(states) - states).detach() if self.form.rounds else states
        output = _Multiply.apply(states, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves go to every tensor; a change of dtype, such as `model.bfloat16()`, leaves scales as they are."""
        before = {name: getattr(self, name) for name in self.names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self


class _Multiply(torch.autograd.Function):
    """The product with a frozen weight, which is opened again in backward and not kept between."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states, layer.dense().to(states.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ ctx.layer.dense().to(gradient.dtype), None


def open_stored(model: nn.Module, has_values: bool) -> nn.Module:
    """Put a `StoredLinear` in the place of each layer that a checkpoint has quantized, in place.

    A model without values was made of its config alone, and gets layers of the same sizes. What another tool quantized
    in a form that is not known here stays as transformers made it.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return model
    stored_layers = {path: m for path, m in model.named_modules() if isinstance(m, StoredLinear)}
    if not has_values and not stored_layers:
        _mark_layers(model, config)
    for path, layer in list(model.named_modules()):
        take = _TAKERS.get(f"{type(layer).__module__.partition('.')[0]}.{type(layer).__name__}")
        if take is not None and (made := take(layer, has_values)) is not None:
            model.set_submodule(path, made)
            _forget_quantizer(model)
    return model


def is_stored(config: Any) -> bool:
    """Return True if a model's config says that its checkpoint holds codes in the place of weights."""
    asked = getattr(config, "quantization_config", None)
    read = asked.get if isinstance(asked, dict) else lambda name: getattr(asked, name, None)
    return asked is not None and read("quantization_mode") != "online"  # "online" keeps BitNet's latent weights


def round_tokens(states: Tensor) -> Tensor:
    """Round each token's activations [..., in] to int8 codes, in float32, and back."""
    wide = states.float()
    scale = LEVEL / wide.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    return ((wide * scale).round().clamp(-LEVEL - 1, LEVEL) / scale).to(states.dtype)


def _forget_quantizer(model: nn.Module) -> None:
    """Let transformers take the model for a dense one, which it saves and moves as any; its config says what it was."""
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions", "is_quantized"):
        if name in vars(model):
            delattr(model, name)


def _mark_layers(model: nn.Module, config: Any) -> None:
    """Have transformers put its own layers where it would for this checkpoint; their weights are on meta."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer.preprocess_model(model=model, dtype=getattr(model, "dtype", None), device_map=None)


def _take_4bit(layer: Any, has_values: bool) -> StoredLinear:
    state = getattr(layer.weight, "quant_state", None)
    if not has_values or state is None:
        total, device = layer.in_features * layer.out_features, META
        blocks = math.ceil(total / BLOCK)
        tensors = {
            "weight": torch.empty(math.ceil(total / 2), 1, dtype=torch.uint8, device=device),
            "absmax": torch.empty(blocks, device=device),
        }
        return StoredLinear(layer, Form(kind=layer.weight.quant_type, block=BLOCK), tensors)
    codes = layer.weight.data.contiguous().view(torch.uint8).view(-1, 1)  # which may be stored as another dtype
    tensors = {"weight": codes, "absmax": state.absmax}
    nested_block = 0
    if state.nested:
        tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        tensors["nested_offset"] = torch.as_tensor(state.offset, device=state.absmax.device)
        nested_block = state.state2.blocksize
    return StoredLinear(layer, Form(kind=state.quant_type, block=state.blocksize, nested_block=nested_block), tensors)


def _open_4bit(layer: Any) -> Tensor:
    """Refuse a flattened weight of several rows, whose ends within a block take a wrong scale (bnb 0.50.2)."""
    form, ops = layer.form, torch.ops.bitsandbytes
    absmax = layer.absmax
    if form.nested_block:
        absmax = ops.dequantize_blockwise(
            absmax, layer.nested_absmax, layer.nested_code, form.nested_block, torch.float32
        )
        absmax = absmax + layer.nested_offset
    shape = (layer.out_features, layer.in_features)
    flat = ops.dequantize_4bit(layer.weight, absmax, form.block, form.kind, (1, shape[0] * shape[1]), torch.float32)
    return flat.view(shape)


def _take_8bit(layer: Any, has_values: bool) -> StoredLinear:
    scales = getattr(layer.weight, "SCB", None)
    if not has_values or scales is None:
        device, shape = META, (layer.out_features, layer.in_features)
        codes, scales = torch.empty(shape, dtype=torch.int8, device=device), torch.empty(shape[0], device=device)
    else:
        codes = layer.weight.data
    return StoredLinear(layer, Form(kind="int8"), {"weight": codes, "scales": scales})


def _open_8bit(layer: Any) -> Tensor:
    return layer.weight * (layer.scales.float()[:, None] / LEVEL)


def _take_packed(layer: Any, has_values: bool) -> StoredLinear:
    device = layer.weight.device if has_values else META
    tensors = {"weight": layer.weight.to(device), "scale": 1 / layer.weight_scale.float().to(device)}
    return StoredLinear(layer, Form(kind="packed", rounds=True), tensors)


def _take_unpacked(layer: Any, has_values: bool) -> StoredLinear | None:
    if layer.online_quant:
        return None  # the weight is a latent one, and a gradient flows through its rounding
    device = layer.weight.device if has_values else META
    codes = torch.empty_like(layer.weight, dtype=torch.int8, device=device)
    scale = torch.empty(1, device=device)
    if has_values:
        codes, scale = layer.weight.data.to(torch.int8), layer.weight_scale.float()
    return StoredLinear(layer, Form(kind="codes", rounds=True), {"weight": codes, "scale": scale})


def _open_packed(layer: Any) -> Tensor:
    """Four codes a byte: the first quarter of the rows in the two lowest bits."""
    packed = layer.weight
    codes = torch.cat([(packed >> (2 * place)) & 3 for place in range(4)])
    return (codes.float() - 1) * layer.scale


def _open_codes(layer: Any) -> Tensor:
    return layer.weight.float() * layer.scale


def prepare_library(config: Any) -> None:
    """Import the library that a quantized checkpoint needs, before transformers does, without a look at the network."""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if str(getattr(method, "value", method)) == "bitsandbytes":
        import_offline("bitsandbytes")


_TAKERS: Final[Mapping[str, Callable[[Any, bool], StoredLinear | None]]] = {
    "bitsandbytes.Linear4bit": _take_4bit,
    "bitsandbytes.Linear8bitLt": _take_8bit,
    "transformers.BitLinear": _take_packed,
    "transformers.AutoBitLinear": _take_unpacked,
}
_OPENERS: Final[Mapping[str, Callable[[Any], Tensor]]] = {
    "nf4": _open_4bit,
    "fp4": _open_4bit,
    "int8": _open_8bit,
    "packed": _open_packed,
    "codes": _open_codes,
}
