"""Write the file: metadata first, then tensor by tensor, so that only one is in memory twice."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from luthier import LuthierError

from luthier_gguf import Gguf
from luthier_gguf.architectures import add_shape, find_architecture
from luthier_gguf.vocabulary import Vocabulary, add_vocabulary
from luthier_gguf.weights import encode, extra_tensors, place_weights, prepare

FILE_TYPES: Final = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "tq1_0": gguf.LlamaFileType.MOSTLY_TQ1_0,
    "tq2_0": gguf.LlamaFileType.MOSTLY_TQ2_0,
}


class Writer(gguf.GGUFWriter):
    """The library's writer, which can also write empty arrays: a tokenizer of bytes has no merges."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype == gguf.GGUFValueType.ARRAY and not len(val):
            return struct.pack("<IIQ", vtype, sub_type, 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def write_file(path: Path, model: Any, vocabulary: Vocabulary, options: Gguf) -> None:
    """Write the model into a new file, which gets this name when it is complete."""
    places = place_weights(model, options)
    state, config = model.state_dict(), model.config
    writer = Writer(None, find_architecture(config).name)
    _add_metadata(writer, config, vocabulary, options)
    for name, values in extra_tensors(config):
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for weight, place in places.items():
        _add_info(writer, place.name, tuple(state[weight].shape), place.kind)
    part = path.with_name(f".{path.name}.part")
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in extra_tensors(config):
            writer.write_tensor_data(values)
        for weight, place in places.items():
            values = prepare(state[weight], place)
            _check_values(weight, values, place.kind)
            writer.write_tensor_data(encode(values, place.kind))
        writer.close()
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _add_metadata(writer: gguf.GGUFWriter, config: Any, vocabulary: Vocabulary, options: Gguf) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[options.type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    add_vocabulary(writer, vocabulary)


def _add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    plain = {Kind.F32: np.float32, Kind.F16: np.float16}.get(kind)
    if plain is not None:
        dtype = np.dtype(plain)
        return writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    packed = gguf.quant_shape_to_byte_shape(shape, kind)
    return writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=kind)


def _check_values(path: str, values: np.ndarray[Any, Any], kind: Kind) -> None:
    largest = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(largest):
        raise LuthierError("gguf:nonfinite-weight", "a weight is NaN or infinite", where=path,
                           remedy="Check the checkpoint that is exported.")  # fmt: skip
    if kind != Kind.F32 and largest > float(np.finfo(np.float16).max):
        problem = f"a weight of {largest:.3g} exceeds float16, in which {kind.name} stores weights or scales"
        raise LuthierError("part-unsupported", problem, where=path)
