"""Weights in GGUF: their names, the order of their rows, their types, and the largest error of a type."""

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
END_TYPES: Final = {Kind.Q4_0: Kind.Q8_0, Kind.TQ1_0: Kind.F16, Kind.TQ2_0: Kind.F16}  # type of embeddings and head

# largest rounding error of a weight, relative to the largest of its block; the scale of a block is a float16
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
    """The place of a parameter in the file: its name, its type, and the heads whose rows are reordered."""

    name: str
    kind: Kind
    heads: int = 0


def place_weights(model: Any, options: Gguf) -> dict[str, Place]:
    """Return the place of each parameter of the model. A head that is tied to the embeddings has none.

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
            raise LuthierError("part-unsupported", f"GGUF has no such weight for {architecture.name}", where=path)
        kind = _kind(path, name, tensor, options)
        places[path] = Place(name=name, kind=kind, heads=_heads(name, config) if architecture.rotated else 0)
    return places


def check_widths(config: Any, options: Gguf) -> None:
    """Raise `part-unsupported` if rows do not divide into the blocks of the type, and fallback is refuse."""
    kind = TYPES[options.type]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for field in ("hidden_size", "intermediate_size"):
        width = getattr(config, field)
        if width % block and options.fallback == "refuse":
            raise _indivisible(field, width, kind, block)


def prepare(tensor: Tensor, place: Place) -> np.ndarray[Any, Any]:
    """Return a weight in float32, with its rows in the order of the file."""
    values = tensor.detach().to("cpu", torch.float32).numpy()
    if not place.heads:
        return values
    pairs = values.reshape(
        place.heads, 2, -1, *values.shape[1:]
    )  # the file interleaves the halves that rotate together
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def encode(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Return a weight in the type of the file, as bytes or numbers."""
    return np.asarray(gguf.quantize(values, kind))


def decode(data: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """Return the float32 numbers that the bytes of a weight stand for."""
    return np.asarray(gguf.dequantize(data, kind), dtype=np.float32)


def largest_error(read: np.ndarray[Any, Any], values: np.ndarray[Any, Any], kind: Kind) -> float:
    """Return the largest error of a weight, relative to the largest of its block."""
    width = gguf.GGML_QUANT_SIZES[kind][0] if kind not in (Kind.F16, Kind.F32) else values.shape[-1]
    if not values.size:
        return 0.0
    moved, blocks = (np.abs(a).reshape(-1, width).max(-1) for a in (read - values, values))
    if not np.isfinite(moved).all():
        return float("inf")
    return float(np.divide(moved, blocks, out=np.where(moved > 0, np.inf, 0.0), where=blocks > 0).max())


def extra_tensors(config: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield the tensors of the file that are no parameters of the model."""
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
            problem = f"weights are not ternary, but {kind.name} can hold nothing else"
            remedy = "Train with quantizer ternary, take type q4_0, or set fallback: f16 for layers left exact."
            raise LuthierError("part-unsupported", problem, where=path, remedy=remedy)
        return _fallback(tensor, options)
    return kind


def _fallback(tensor: Tensor, options: Gguf) -> Kind:
    kind = TYPES[options.fallback]
    return Kind.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _is_ternary(tensor: Tensor) -> bool:
    """Return True if the weights of each block are -s, 0 and s."""
    blocks = tensor.detach().float().reshape(-1, gguf.GGML_QUANT_SIZES[Kind.TQ2_0][0]).abs()
    largest = blocks.amax(1, keepdim=True)
    return bool(((blocks <= HALF * largest) | (blocks >= (1 - HALF) * largest)).all())


def _heads(name: str, config: Any) -> int:
    part = name.split(".")[-2]
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part, 0)


def _indivisible(where: str, width: int, kind: Kind, block: int) -> LuthierError:
    problem = f"rows of {width} weights do not divide into blocks of {block}, which {kind.name} needs"
    remedy = "Take type f16, or set fallback: f16 for such matrices."
    return LuthierError("part-unsupported", problem, where=where, remedy=remedy)
