"""Read and write a prompt in PEFT's layout: adapter_config.json, and a table in adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PeftFields,
    peft_misfit,
    read_peft_config,
    read_peft_tensors,
    write_peft_files,
)
from torch import Tensor

from luthier_prompt import PrefixTuning, PromptTuning

TABLE: Final = "prompt_embeddings"
PROMPTS: Final = ("PROMPT_TUNING", "P_TUNING")  # PEFT writes both as a table of embeddings
PREFIXES: Final = ("PREFIX_TUNING",)
FITS: Final = "Use the base model and the options that it was trained with."
FIELDS: Final = PeftFields(
    kinds=(*PROMPTS, *PREFIXES),
    types={"num_virtual_tokens": (int,), "num_transformer_submodules": (int,)},
    required=("num_virtual_tokens",),
    neutral=(  # how the table began, and sizes, which it has itself
        *("init_weights", "num_attention_heads", "num_layers", "prefix_projection", "token_dim", "tokenizer_kwargs"),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
        *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"),
    ),
)


def save_table(folder: Path, table: Tensor, config: Mapping[str, Any]) -> None:
    """Write both files, the table in float32."""
    plain = table.detach().to("cpu", torch.float32).contiguous()
    write_peft_files(folder, config, {TABLE: plain})


def load_table(folder: Path, kinds: Collection[str], shape: torch.Size) -> Tensor:
    """Return the table of a folder of ours or PEFT's.

    Raises `artifact-not-found`, or `artifact-mismatch` if it is damaged, of another method, or of another shape.
    """
    config = read_config(folder)
    if config["peft_type"] not in kinds:
        problem = f"peft_type is {config['peft_type']!r}, not {' or '.join(kinds)}"
        raise peft_misfit(folder / PEFT_CONFIG, problem, "Use the adapter that made it.")
    tensors = read_peft_tensors(folder)
    if tensors.keys() != {TABLE}:
        raise peft_misfit(
            folder / PEFT_WEIGHTS, f"it holds {', '.join(sorted(tensors)) or 'nothing'}, not {TABLE} alone"
        )
    if tensors[TABLE].shape != shape:
        problem = f"{TABLE} has shape {list(tensors[TABLE].shape)}, the adapter's is {list(shape)}"
        raise peft_misfit(folder / PEFT_WEIGHTS, problem)
    return tensors[TABLE]


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a prompt or prefix, or raise."""
    config = read_peft_config(folder, FIELDS)
    if (config.get("num_transformer_submodules") or 1) != 1:
        raise peft_misfit(folder / PEFT_CONFIG, "it is for a model with encoder and decoder", "Train it on a decoder.")
    return config


def read_options(folder: Path) -> PromptTuning | PrefixTuning:
    """Return the options with which the adapter in this folder can be attached and loaded."""
    config = read_config(folder)
    kind = PromptTuning if config["peft_type"] in PROMPTS else PrefixTuning
    return kind(num_virtual_tokens=config["num_virtual_tokens"])
