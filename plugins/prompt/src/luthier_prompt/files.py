"""Read and write a prompt in PEFT's layout: adapter_config.json, and a table in adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import LuthierError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier_prompt import PrefixTuning, PromptTuning

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
TABLE: Final = "prompt_embeddings"
PROMPTS: Final = ("PROMPT_TUNING", "P_TUNING")  # PEFT writes both as a table of embeddings
PREFIXES: Final = ("PREFIX_TUNING",)
FITS: Final = "Use the base model and the options that it was trained with."


def save_table(folder: Path, table: Tensor, config: Mapping[str, Any]) -> None:
    """Write both files, the table in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = table.detach().to("cpu", torch.float32).contiguous()
    save_file({TABLE: plain}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_table(folder: Path, kinds: Collection[str], shape: torch.Size) -> Tensor:
    """Return the table of a folder of ours or PEFT's.

    Raises `artifact-not-found`, or `artifact-mismatch` if it is damaged, of another method, or of another shape.
    """
    config = read_config(folder)
    if config["peft_type"] not in kinds:
        problem = f"peft_type is {config['peft_type']!r}, not {' or '.join(kinds)}"
        raise _misfit(folder / CONFIG, problem, "Use the adapter that made it.")
    tensors = _tensors(folder)
    if tensors.keys() != {TABLE}:
        raise _misfit(folder / WEIGHTS, f"it holds {', '.join(sorted(tensors)) or 'nothing'}, not {TABLE} alone")
    if tensors[TABLE].shape != shape:
        problem = f"{TABLE} has shape {list(tensors[TABLE].shape)}, the adapter's is {list(shape)}"
        raise _misfit(folder / WEIGHTS, problem)
    return tensors[TABLE]


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a prompt or prefix, or raise."""
    path = folder / CONFIG
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {CONFIG} in this folder", where=str(folder))
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise _misfit(path, f"not JSON: {error}", "Copy the file again.") from None
    if not isinstance(config, dict) or config.get("peft_type") not in (*PROMPTS, *PREFIXES):
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise _misfit(path, f"peft_type is {kind!r}, which is not a prompt", "Use the adapter that made it.")
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise _misfit(path, "it is for a model with encoder and decoder", "Train it on a decoder.")
    return config


def read_options(folder: Path) -> PromptTuning | PrefixTuning:
    """Return the options with which the adapter in this folder can be attached and loaded."""
    config = read_config(folder)
    kind = PromptTuning if config["peft_type"] in PROMPTS else PrefixTuning
    return kind(num_virtual_tokens=config["num_virtual_tokens"])


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "Save it as safetensors: a .bin file is a pickle, which can run code." if pickled else None
        raise LuthierError("artifact-not-found", f"no {WEIGHTS} in this folder", where=str(folder), remedy=remedy)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _misfit(path, f"not a whole safetensors file: {error}", "Copy the file again.") from None


def _misfit(path: Path, problem: str, remedy: str = FITS) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(path), remedy=remedy)
