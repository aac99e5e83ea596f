"""A trained `bitnet` model as transformers' packed BitNet checkpoint: two bits a weight, one scale a tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

import torch
from luthier import LuthierError
from luthier_kernels.ternary.packing import pack_rows
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_bitnet.layer import TernaryLinear
from luthier_bitnet.quantizer import find_layers

RETRAIN: Final = "Train with quantizer bitnet and adapter full."
WEIGHTS: Final = "model.safetensors"
# the class that reads `weight_scale` decides its meaning: one divides by it, the other multiplies
CLASSES: Final = {"divide": "bitlinear", "multiply": "autobitlinear"}


def write_packed(model: Any, folder: Path, convention: Literal["divide", "multiply"]) -> None:
    """Write the model. If the format cannot hold a layer, raise `part-unsupported` and write nothing.

    `divide` writes 1 / scale for `BitLinear`, `multiply` the scale for `AutoBitLinear` in offline mode.
    """
    layers = find_layers(model)
    if not layers:
        problem = "no packed BitNet file: no layer of the model is ternary"
        raise LuthierError("part-unsupported", problem, where=type(model).__name__, remedy=RETRAIN)
    for path, layer in layers.items():
        _check_layer(path, layer)
    tensors = _collect(model, layers, convention)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    _write_config(model, folder, convention)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _check_layer(path: str, layer: TernaryLinear) -> None:
    form = layer.form
    problems = [
        (path.endswith(".base_layer"), "an adapter is around the layer", "Train with adapter full."),
        (layer.stage.share != 1, "the schedule has not ended", "Train to the end of the schedule."),
        (not form.integers, "the format needs int8 activations", RETRAIN),
        (form.granularity != "tensor", "the format needs one scale for each tensor", "Train with granularity: tensor."),
        (layer.sub_norm is not None, "the format has no norm of single layers", "Train without sub_norms."),
        (layer.transposed, "the format has no Conv1D", "Take a base of another architecture, such as Llama."),
        (layer.out_features % 4 != 0, f"{layer.out_features} outputs are not divisible by 4",
         "Leave this layer exact with the quantizer's skip_modules, and train again."),
    ]  # fmt: skip
    for condition, problem, remedy in problems:
        if condition:
            raise LuthierError("part-unsupported", f"no packed BitNet file: {problem}", where=path, remedy=remedy)


def _collect(model: Any, layers: dict[str, TernaryLinear], convention: str) -> dict[str, Tensor]:
    """Return the tensors by name, a tied one once."""
    own = {f"{path}.weight" for path in layers}
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if name not in own and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().contiguous()
    for path, layer in layers.items():
        with torch.no_grad():
            codes, scales = layer.rounded()
        scale = scales.view(1)
        tensors[f"{path}.weight"] = pack_rows(codes)
        tensors[f"{path}.weight_scale"] = (1 / scale if convention == "divide" else scale).to(layer.weight.dtype)
    return tensors


def _write_config(model: Any, folder: Path, convention: str) -> None:
    """Write the configuration of the model, which says which layers are packed, and how."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    exact = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": CLASSES[convention],
        "quantization_mode": "offline",
        "modules_to_not_convert": exact,
    }
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
