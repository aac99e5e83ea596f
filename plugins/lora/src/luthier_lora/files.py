"""Read and write an adapter in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from luthier import LuthierError, drop_base_copies
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier_lora.extras import Extras
from luthier_lora.options import AdaLora, Dora, Lora
from luthier_lora.patterns import choose_by_pattern
from luthier_lora.targets import Targets
from luthier_lora.token_rows import drop_tied_rows

PREFIX: Final = "base_model.model."
CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

# Fields of PEFT's LoraConfig that do not change what the tensors mean once their names and shapes fit.
NEUTRAL: Final = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *("alpha_pattern", "bias", "modules_to_save", "rank_pattern"),  # read as options; their tensors are checked
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "target_parameters"),
    *("eva_config", "fan_in_fan_out", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
}
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
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


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
            raise misfit(folder / CONFIG, f"the adapter has {name} {config[name]!r}, the options {value!r}")
    for field, pattern in PATTERNS.items():
        for layer in targets.modules:
            theirs = choose_by_pattern(config[pattern] or {}, layer, config[field])
            ours = choose_by_pattern(getattr(options, pattern), layer, getattr(options, field))
            if theirs != ours:
                raise misfit(folder / CONFIG, f"the adapter has {field} {theirs!r} at {layer}, the options {ours!r}")
    if (config["init_lora_weights"] == "pissa") != (options.init_lora_weights == "pissa"):
        began = config["init_lora_weights"]
        raise misfit(folder / CONFIG, f"the adapter has init_lora_weights {began!r}, the options have another")
    scales = {name: torch.ones_like(tensor) for name, tensor in state.items() if name.endswith(SCALE)}
    fill(state, {**read_own(folder, model, state), **scales}, str(folder / WEIGHTS), "artifact-mismatch")


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a LoRA or DoRA that needs only its matrices, or raise."""
    config = read_json(folder, "LORA")
    for name, value in config.items():
        if _changes_meaning(name, value):
            raise misfit(folder / CONFIG, f"it uses {name}: {value!r}", "Use the adapter peft.lora for it.")
    tokens = config.get("trainable_token_indices")
    if isinstance(tokens, dict):
        remedy = "Give the rows of the input embedding alone, or use the adapter peft.lora."
        raise misfit(folder / CONFIG, f"it uses trainable_token_indices by modules: {sorted(tokens)}", remedy)
    return {**OURS, **config, "trainable_token_indices": tokens or None}


def read_json(folder: Path, kind: str) -> dict[str, Any]:
    """Return adapter_config.json of this PEFT type, or raise."""
    path = folder / CONFIG
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {CONFIG} in this folder", where=str(folder))
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise misfit(path, f"not JSON: {error}", "Copy the file again.") from None
    if not isinstance(config, dict) or config.get("peft_type") != kind:
        peft_type = config.get("peft_type") if isinstance(config, dict) else config
        raise misfit(path, f"peft_type is {peft_type!r}, not {kind!r}", "Use the adapter peft.<method> that made it.")
    return config


def read_options(folder: Path) -> Lora | Dora | AdaLora:
    """Return the options with which the adapter in this folder can be attached and loaded."""
    if is_adalora(folder):
        given = read_json(folder, "ADALORA")
        return AdaLora(**{f.name: given[f.name] for f in attrs.fields(AdaLora) if given.get(f.name) is not None})
    config = read_config(folder)
    if config.get("layers_to_transform"):
        raise misfit(folder / CONFIG, "it uses layers_to_transform", "Name the layers in target_modules.")
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern",
             "alpha_pattern", "bias", "modules_to_save", "trainable_token_indices")  # fmt: skip
    config["modules_to_save"] = [*(config["modules_to_save"] or []), *_copied_modules(folder, config)] or None
    given = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("use_dora"):
        return Dora(**given)
    began: Any = "pissa" if config["init_lora_weights"] == "pissa" else True
    return Lora(**given, target_parameters=config.get("target_parameters"), init_lora_weights=began)


def is_adalora(folder: Path) -> bool:
    """Return True if the adapter in a folder is one of AdaLoRA."""
    path = folder / CONFIG
    return path.is_file() and '"ADALORA"' in path.read_text("utf-8", errors="replace")


def fill(state: Mapping[str, Tensor], given: Mapping[str, Any], where: str, code: str) -> None:
    """Copy tensors into those of the same names. If one is missing, unknown or of another shape, change nothing."""
    for problem, names in (("lacks", state.keys() - given.keys()), ("has unknown", given.keys() - state.keys())):
        if names:
            first = sorted(names)[0]
            raise LuthierError(code, f"{problem} {len(names)} tensors", where=where, found=first, remedy=FITS)
    for name, tensor in state.items():
        if tensor.shape != given[name].shape:
            problem = f"{name} has shape {list(given[name].shape)}, the model's is {list(tensor.shape)}"
            raise LuthierError(code, problem, where=where, remedy=FITS)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(given[name])


def read_own(folder: Path, model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the file but for the base's own, which PEFT adds if the base was resized."""
    where = str(folder / WEIGHTS)
    tensors = drop_base_copies(model, read_tensors(folder), state.keys(), where)
    return drop_tied_rows(model, tensors, PREFIX, where)


def _copied_modules(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the paths of the embedding and head that PEFT has added whole, as it does if the base was resized."""
    path = folder / WEIGHTS
    if not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            names = [name.removeprefix(PREFIX) for name in file.keys()]  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise misfit(path, f"not a whole safetensors file: {error}", "Copy the file again.") from None
    whole = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and not UPDATE.search(name)]
    saved = [re.compile(rf"{re.escape(end)}(\.|$)") for end in config["modules_to_save"] or ()]
    return sorted(name for name in whole if not any(one.search(name) for one in saved))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of adapter_model.safetensors."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = "Save it as safetensors: a .bin file is a pickle, which can run code." if pickled else None
        raise LuthierError("artifact-not-found", f"no {WEIGHTS} in this folder", where=str(folder), remedy=remedy)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise misfit(path, f"not a whole safetensors file: {error}", "Copy the file again.") from None


def _changes_meaning(name: str, value: object) -> bool:
    if name == "init_lora_weights":
        return value not in (*RANDOM, "pissa")
    return not (name in NEUTRAL or name in OURS or not value)


def misfit(path: Path, problem: str, remedy: str = FITS) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(path), remedy=remedy)
