"""Read and write an adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from luthier import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LuthierError,
    PeftFields,
    drop_base_copies,
    fill_tensors,
    peft_misfit,
    read_peft_config,
    read_peft_object,
    read_peft_tensors,
    write_peft_files,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier_lora.extras import Extras
from luthier_lora.options import AdaLora, Dora, Lora
from luthier_lora.patterns import choose_by_pattern
from luthier_lora.targets import Targets
from luthier_lora.token_rows import drop_tied_rows

PREFIX: Final = "base_model.model."

TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "target_parameters"), (list, str)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("use_rslora", "use_dora"), (bool,)),
    **{"r": (int,), "bias": (str,), "init_lora_weights": (bool, str), "trainable_token_indices": (list, dict)},
}
# Fields of PEFT's LoraConfig that do not change what the tensors mean once their names and shapes fit.
NEUTRAL: Final = (
    *("layers_pattern", "layers_to_transform"),
    *("eva_config", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
)
LORA: Final = PeftFields(kinds=("LORA",), types=TYPES, neutral=NEUTRAL, remedy="Use the adapter peft.lora for it.")
SCHEDULE: Final = ("init_r", "target_r", "tinit", "tfinal", "deltaT")
ADALORA: Final = PeftFields(
    kinds=("ADALORA",),
    types={
        **TYPES,
        **dict.fromkeys((*SCHEDULE, "total_step"), (int,)),
        **dict.fromkeys(("beta1", "beta2", "orth_reg_weight"), (int, float)),
    },
    neutral=NEUTRAL,
    remedy="Use the adapter peft.adalora for it.",
)
OURS: Final[Mapping[str, Any]] = {  # with PEFT's defaults
    **{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none"},
    **{"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True},
    "trainable_token_indices": None,
}
RANDOM: Final = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that do not change the base
PATTERNS: Final = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
SCALE: Final = ".lora_scale"
UPDATE: Final = re.compile(r"\.(lora_\w+|base_layer)\.")  # parts of an adapted layer, in a tensor's name
FITS: Final = "Use the base model and the options that it was trained with."


def save(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write both files, the tensors in float32."""
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    write_peft_files(folder, config, tensors)


def fold_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with each learned scale multiplied into its B, because PEFT's files have no scale."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith(SCALE)}
    for name in state.keys() - folded.keys():
        b = f"{name.removesuffix(SCALE)}.lora_B.weight"
        folded[b] = folded[b] * state[name]
    return folded


def describe(model: Any, options: Lora | Dora, targets: Targets, extras: Extras) -> dict[str, Any]:
    """Return the content of adapter_config.json, which names the adapted layers instead of the pattern."""
    head = model.get_output_embeddings()
    parameters = sorted(f"{module}.{name}" for module, name in targets.parameters)
    return {
        "alpha_pattern": options.alpha_pattern,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "bias": options.bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(type(m).__name__ == "Conv1D" for m in model.modules()),
        "inference_mode": True,
        "init_lora_weights": True if options.init_lora_weights == "loftq" else options.init_lora_weights,
        "lora_alpha": options.lora_alpha,
        "lora_bias": False,
        "lora_dropout": options.lora_dropout,
        "modules_to_save": list(extras.saved) or None,
        "peft_type": "LORA",
        "r": options.r,
        "rank_pattern": options.rank_pattern,
        "revision": None,
        "target_modules": shortest(model, targets.layers),
        "target_parameters": parameters or None,
        "task_type": None if head is None else "CAUSAL_LM",
        "trainable_token_indices": list(extras.tokens) or None,
        "use_dora": isinstance(options, Dora),
        "use_rslora": options.use_rslora,
    }


def shortest(model: Any, layers: tuple[str, ...]) -> list[str]:
    """Return the last parts of these names, or the full names if the parts would match other modules too."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    others = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends} - set(layers)
    return sorted(layers) if others else ends


def load(folder: Path, model: Any, options: Lora | Dora, targets: Targets, state: Mapping[str, Tensor]) -> None:
    """Read a folder of ours or PEFT's into `state`, the tensors of the adapter in `model`. An error changes nothing.

    Raises `artifact-not-found`, or `artifact-mismatch` if it is damaged, uses something that is not supported here, or
    was trained with other options or another model.
    """
    config = read_config(folder)
    mine = {"use_rslora": options.use_rslora, "use_dora": isinstance(options, Dora), "bias": options.bias,
            "trainable_token_indices": options.trainable_token_indices or None}  # fmt: skip
    for name, value in mine.items():
        if config[name] != value:
            raise peft_misfit(folder / PEFT_CONFIG, f"the adapter has {name} {config[name]!r}, the options {value!r}")
    for field, pattern in PATTERNS.items():
        for layer in targets.modules:
            theirs = choose_by_pattern(config[pattern] or {}, layer, config[field])
            ours = choose_by_pattern(getattr(options, pattern), layer, getattr(options, field))
            if theirs != ours:
                raise peft_misfit(
                    folder / PEFT_CONFIG, f"the adapter has {field} {theirs!r} at {layer}, the options {ours!r}"
                )
    if (config["init_lora_weights"] == "pissa") != (options.init_lora_weights == "pissa"):
        began = config["init_lora_weights"]
        raise peft_misfit(
            folder / PEFT_CONFIG, f"the adapter has init_lora_weights {began!r}, the options have another"
        )
    scales = {name: torch.ones_like(tensor) for name, tensor in state.items() if name.endswith(SCALE)}
    fill_tensors(state, {**read_own(folder, model, state), **scales}, str(folder / PEFT_WEIGHTS), "artifact-mismatch")


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a LoRA or DoRA that needs only its matrices, or raise."""
    config = read_peft_config(folder, LORA)
    began = config.get("init_lora_weights")
    if began not in (*RANDOM, "pissa", None):
        raise peft_misfit(folder / PEFT_CONFIG, f"it uses init_lora_weights: {began!r}", LORA.remedy)
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict):
        remedy = "Give the rows of the input embedding alone, or use the adapter peft.lora."
        raise peft_misfit(folder / PEFT_CONFIG, f"it uses trainable_token_indices by modules: {sorted(tokens)}", remedy)
    return {**OURS, **config, "trainable_token_indices": tokens or None}


def read_options(folder: Path) -> Lora | Dora | AdaLora:
    """Return the options with which the adapter in this folder can be attached and loaded."""
    if is_adalora(folder):
        given = read_peft_config(folder, ADALORA)
        return AdaLora(**{f.name: given[f.name] for f in attrs.fields(AdaLora) if given.get(f.name) is not None})
    config = read_config(folder)
    if config.get("layers_to_transform"):
        raise peft_misfit(folder / PEFT_CONFIG, "it uses layers_to_transform", "Name the layers in target_modules.")
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
             "alpha_pattern", "bias", "modules_to_save", "trainable_token_indices")  # fmt: skip
    config["modules_to_save"] = [*(config["modules_to_save"] or []), *_copied_modules(folder, config)] or None
    given = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("use_dora"):
        return Dora(**given)
    began: Any = "pissa" if config["init_lora_weights"] == "pissa" else True
    return Lora(**given, target_parameters=config.get("target_parameters"), init_lora_weights=began)


def is_adalora(folder: Path) -> bool:
    """Return True if the adapter in a folder is one of AdaLoRA. Raises as `read_peft_object` does."""
    return read_peft_object(folder).get("peft_type") == "ADALORA"


def read_own(folder: Path, model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the file but for the base's own, which PEFT adds if the base was resized."""
    where = str(folder / PEFT_WEIGHTS)
    tensors = drop_base_copies(model, read_peft_tensors(folder), state.keys(), where)
    return drop_tied_rows(model, tensors, PREFIX, where)


def _copied_modules(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the paths of the embedding and head that PEFT has added whole, as it does if the base was resized."""
    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            names = [name.removeprefix(PREFIX) for name in file.keys()]  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise LuthierError("file-damaged", f"not a whole safetensors file: {error}", where=str(path)) from None
    whole = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and not UPDATE.search(name)]
    saved = [re.compile(rf"{re.escape(end)}(\.|$)") for end in config["modules_to_save"] or ()]
    return sorted(name for name in whole if not any(one.search(name) for one in saved))
