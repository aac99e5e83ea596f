"""Read and write an adapter: PEFT's LoRA files, and the B that is not in use, for the next task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import (
    PEFT_CONFIG,
    LuthierError,
    PeftFields,
    peft_misfit,
    read_peft_config,
    read_peft_tensors,
    write_peft_files,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier_slao import Slao

PREFIX: Final = "base_model.model."
ACCUMULATOR: Final = "slao.safetensors"
NUMBERS: Final = "slao.json"
LORA_B: Final = ".lora_B.weight"
FIELDS: Final = PeftFields(
    kinds=("LORA",),
    types={
        **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
        **{"r": (int,), "bias": (str,), "init_lora_weights": (bool, str)},
    },
    neutral=(
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
        *("eva_config", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    ),
    remedy="Begin with a plain LoRA.",
)
RANDOM: Final = (True, False, "gaussian", "eva", "orthogonal", None)  # initialisations that do not change the base
FITS: Final = "Use the base model and the options that it was trained with."


def save_adapter(folder: Path, model: Any, options: Slao, tensors: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them."""
    named = {PREFIX + name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
    targets = sorted({name.removesuffix(".weight").rpartition(".")[0] for name in tensors})
    config = {
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": any(type(m).__name__ == "Conv1D" for m in model.modules()),
        "inference_mode": True,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "peft_type": "LORA",
        "r": options.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    write_peft_files(folder, config, named)


def save_accumulator(folder: Path, others: Mapping[str, Tensor], num_merged: int) -> None:
    """Write each layer's other B, and the number of merged tasks."""
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in others.items()}, folder / ACCUMULATOR)
    (folder / NUMBERS).write_text(json.dumps({"num_merged": num_merged}) + "\n", "utf-8")


def load_adapter(folder: Path, options: Slao) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the tensors in use by their names in the model, the others by layer, and the number of merged tasks.

    A folder of plain LoRA, which lacks the other B, counts as the end of a first task, whose B is the merged one.
    Raises `artifact-not-found` or `artifact-mismatch`.
    """
    _check_config(folder, options)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_peft_tensors(folder).items()}
    if not (folder / ACCUMULATOR).is_file() and not (folder / NUMBERS).is_file():
        return tensors, {n.removesuffix(LORA_B): t for n, t in tensors.items() if n.endswith(LORA_B)}, 1
    return tensors, _read_tensors(folder / ACCUMULATOR), int(_read_json(folder / NUMBERS)["num_merged"])


def _check_config(folder: Path, options: Slao) -> None:
    """Raise `artifact-not-found`, or `artifact-mismatch` for anything but a plain LoRA of these options."""
    config = read_peft_config(folder, FIELDS)
    if config.get("init_lora_weights") not in RANDOM:
        problem = f"it uses init_lora_weights: {config['init_lora_weights']!r}"
        raise peft_misfit(folder / PEFT_CONFIG, problem, FIELDS.remedy)
    for name in ("r", "lora_alpha"):
        if config.get(name) != getattr(options, name):
            problem = f"the adapter has {name} {config.get(name)!r}, the options {getattr(options, name)!r}"
            raise peft_misfit(folder / PEFT_CONFIG, problem)


def check_finite(given: Mapping[str, Tensor], where: str, code: str) -> None:
    """Raise `code` if a tensor has a number that is not finite."""
    for name, tensor in given.items():
        if not torch.isfinite(tensor).all():
            raise LuthierError(code, f"{name} holds NaN or infinity", where=where, remedy="Use an earlier checkpoint.")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {path.name} in this folder", where=str(path.parent))
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LuthierError("file-damaged", f"not JSON: {error}", where=str(path)) from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {path.name} in this folder", where=str(path.parent))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LuthierError("file-damaged", f"not a whole safetensors file: {error}", where=str(path)) from None
