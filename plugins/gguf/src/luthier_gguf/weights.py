"""Weights as GGUF holds them: their names, the order of their rows, their types, and how far a type may move them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs
import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from luthier import LuthierError
from torch import Tensor

from luthier_gguf import Gguf
from luthier_gguf.architectures import find_architecture, rope_factors

FACTORS: Final = "rope_freqs.weight"
TYPES: Final = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "tq1_0": Kind.TQ1_0, "tq2_0": Kind.TQ2_0}
TERNARY: Final = (Kind.TQ1_0, Kind.TQ2_0)
ENDS: Final = ("token_embd.weight", "output.weight")
END_TYPES: Final = {Kind.Q4_0: Kind.Q8_0, Kind.TQ1_0: Kind.F16, Kind.TQ2_0: Kind.F16}  # embeddings and head

# the furthest that rounding moves a weight, in units of the largest of its block; a block's scale is a float16
HALF: Final = 2.0**-11
BOUNDS: Final = {
    Kind.F32: 0.0,
    Kind.F16: HALF,
    Kind.Q8_0: 1 / 254 + 2 * HALF,
    Kind.Q4_0: 1 / 8 + 2 * HALF,
    Kind.TQ1_0: 2 * HALF,
    Kind.TQ2_0: 2 * HALF,
}


@attrs.frozen(kw_only=True)
class Place:
    """Where a parameter goes: its name and type in the file, and the heads whose rows are put in another order."""

    name: str
    kind: Kind
    heads: int = 0


def place_weights(model: Any, options: Gguf) -> dict[str, Place]:
    """Return for each parameter of the model where it goes; a head tied to the embeddings goes nowhere.

    Raises `part-unsupported` for a weight that the architecture has no name for, or that its type cannot hold.
    """
    config = model.config
    architecture = find_architecture(config)
    names = gguf.get_tensor_name_map(architecture.number, config.num_hidden_layers)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    places = {}
    for path, tensor in model.state_dict().items():
        if path == tied:
            continue
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LuthierError("part-unsupported", f"{architecture.name} has no such weight in GGUF", where=path)
        kind = _kind(path, name, tensor, options)
        places[path] = Place(name=name, kind=kind, heads=_heads(name, config) if architecture.rotated else 0)
    return places


def check_widths(config: Any, options: Gguf) -> None:
    """Raise `part-unsupported` where rows of these widths do not divide into the type's blocks, and may not."""
    kind = TYPES[options.type]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for field in ("hidden_size", "intermediate_size"):
        width = getattr(config, field)
        if width % block and options.fallback == "refuse":
            raise _indivisible(field, width, kind, block)


def prepare(tensor: Tensor, place: Place) -> np.ndarray[Any, Any]:
    """Return a weight in float32, its rows in the file's order."""
    values = tensor.detach().to("cpu", torch.float32).numpy()
    if not place.heads:
        return values
    pairs = values.reshape(place.heads, 2, -1, *values.shape[1:])  # halves that rotate together, side by side there
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def encode(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Return the bytes, or the numbers, of a weight."""
    return np.asarray(gguf.quantize(values, kind))


def decode(data: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Return the numbers that are read from a weight's bytes, in float32."""
    return np.asarray(gguf.dequantize(data, kind), dtype=np.float32)


def largest_error(read: np.ndarray[Any, Any], values: np.ndarray[Any, Any], kind: Kind) -> float:
    """Return the furthest that a weight has moved, in units of the largest of its block."""
    width = gguf.GGML_QUANT_SIZES[kind][0] if kind not in (Kind.F16, Kind.F32) else values.shape[-1]
    if not values.size:
        return 0.0
    moved, blocks = (np.abs(a).reshape(-1, width).max(-1) for a in (read - values, values))
    if not np.isfinite(moved).all():
        return float("inf")
    return float(np.divide(moved, blocks, out=np.where(moved > 0, np.inf, 0.0), where=blocks > 0).max())


def extra_tensors(config: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield what is no parameter of the model and a tensor of the file."""
    factors = rope_factors(config)
    if factors is not None:
        yield FACTORS, np.array(factors, dtype=np.float32)


def _kind(path: str, name: str, tensor: Tensor, options: Gguf) -> Kind:
    if tensor.dim() < 2:
        return Kind.F32
    chosen = TYPES[options.type]
    kind = END_TYPES.get(chosen, chosen) if name in ENDS else chosen
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.shape[-1] % block:
        if options.fallback == "refuse":
            raise _indivisible(path, tensor.shape[-1], kind, block)
        return _fallback(tensor, options)
    if kind in TERNARY and not _is_ternary(tensor):
        if options.fallback == "refuse":
            problem = f"weights are not ternary, and {kind.name} holds nothing else"
            remedy = "Train with quantizer ternary, take type q4_0, or set fallback: f16 for layers left exact."
            raise LuthierError("part-unsupported", problem, where=path, remedy=remedy)
        return _fallback(tensor, options)
    return kind


def _fallback(tensor: Tensor, options: Gguf) -> Kind:
    kind = TYPES[options.fallback]
    return Kind.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _is_ternary(tensor: Tensor) -> bool:
    """The weights of each block are -s, 0 and s."""
    blocks = tensor.detach().float().reshape(-1, gguf.GGML_QUANT_SIZES[Kind.TQ2_0][0]).abs()
    largest = blocks.amax(1, keepdim=True)
    return bool(((blocks <= HALF * largest) | (blocks >= (1 - HALF) * largest)).all())


def _heads(name: str, config: Any) -> int:
    part = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part, 0)


def _indivisible(where: str, width: int, kind: Kind, block: int) -> LuthierError:
    problem = f"rows of {width} weights do not divide into blocks of {block}, as {kind.name} has them"
    remedy = "Take type f16, or set fallback: f16 for such matrices."
    return LuthierError("part-unsupported", problem, where=where, remedy=remedy)
