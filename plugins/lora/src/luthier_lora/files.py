"""An adapter's folder in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import LuthierError
from luthier_lora.options import Dora, Lora
from luthier_lora.targets import Targets

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(folder: Path, model: Any, options: Lora | Dora, targets: Targets, state: Mapping[str, Tensor]) -> None:
    """Both files, tensors in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(describe(model, options, targets), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", "utf-8")


def describe(model: Any, options: Lora | Dora, targets: Targets) -> dict[str, Any]:
    """adapter_config.json, as PEFT's LoraConfig reads it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "use_dora": isinstance(options, Dora),
        "bias": "none",
        "target_modules": sorted(targets.layers),
    }


def load(folder: Path, options: Lora | Dora, state: Mapping[str, Tensor]) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise LuthierError("artifact-not-found", f"no {name} in this folder", where=str(folder))
    fill(state, load_file(folder / WEIGHTS), str(folder / WEIGHTS), "artifact-mismatch")


def fill(state: Mapping[str, Tensor], given: Mapping[str, Any], where: str, code: str) -> None:
    """Copy tensors into the parameters of the same names; nothing is changed where one is missing or too many."""
    missing, unknown = sorted(state.keys() - given.keys()), sorted(given.keys() - state.keys())
    if missing or unknown:
        raise LuthierError(code, f"missing tensors: {missing}; unknown tensors: {unknown}", where=where)
    for name, tensor in state.items():
        if tensor.shape != given[name].shape:
            raise LuthierError(code, f"{name} has shape {list(given[name].shape)}", where=where)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(given[name])
