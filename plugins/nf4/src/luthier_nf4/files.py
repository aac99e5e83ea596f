"""Write a 4-bit model so that transformers loads it with bitsandbytes: its config and one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from luthier import LuthierError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_nf4.layer import FourBitLinear

WEIGHTS: Final = "model.safetensors"


def write_model(model: Any, folder: Path) -> None:
    """Write a model with `FourBitLinear` layers and without an adapter around them.

    Raises `part-unsupported` if there is no such layer, or an adapter around one. Then nothing is written.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, FourBitLinear)}
    wrapped = [path for path in layers if path.endswith(".base_layer")]
    if not layers or wrapped:
        problem = "an adapter is around a layer" if wrapped else "no layer is in 4 bits"
        raise LuthierError("part-unsupported", problem, where=(wrapped or [type(model).__name__])[0])
    tensors = _collect(model, layers)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    _write_config(model, folder, layers)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _collect(model: Any, layers: dict[str, FourBitLinear]) -> dict[str, Tensor]:
    """Return every tensor by its name in a checkpoint, a tied one once."""
    buffers = {f"{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_buffers(recurse=False)}
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if name not in buffers and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    for path, layer in layers.items():
        for name, tensor in layer.held().to_tensors().items():
            tensors[f"{path}.weight.{name}".removesuffix(".")] = tensor.contiguous()
    return tensors


def _write_config(model: Any, folder: Path, layers: dict[str, FourBitLinear]) -> None:
    """Write the config of the model, which says how its layers are quantized, and which are not."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    form = next(iter(layers.values())).form
    exact = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    dtype = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.kind,
        "bnb_4bit_use_double_quant": form.nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": exact,
    }
    config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
