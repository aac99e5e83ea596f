"""Read and write an adapter in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import PEFT_WEIGHTS, LuthierError, drop_base_copies, read_peft_object, read_peft_tensors
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from luthier_peft.omitted import BOOKKEEPING

ADAPTER: Final = "default"
FITS: Final = "Use the base model and the options that it was trained with."
# settings that do not change what the adapter computes, or that the names of the tensors already determine
FREE: Final = {
    "target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "target_parameters", "rank_pattern", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2",
    "orth_reg_weight", "target_r", "progressbar", "d_initial", *BOOKKEEPING,
}  # fmt: skip


def save(handle: PeftModel, folder: Path) -> None:
    """Write a folder that plain `PeftModel.from_pretrained(base, folder)` reads."""
    # Unless False, PEFT may ask the hub for the size of the vocabulary. Trained embeddings are saved anyway.
    state_dict = get_peft_model_state_dict(handle, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state_dict.items())}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(handle.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = getattr(handle.base_model.model, "name_or_path", None) or None
    for name, value in vars(config).items():
        if isinstance(value, set):  # a set has no order, but files should be reproducible
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a folder. Raises `artifact-not-found` if one is missing; nothing is downloaded."""
    return read_peft_object(folder), read_peft_tensors(folder)


def check_config(config: Any, stored: Mapping[str, Any], where: str) -> None:
    """Raise `artifact-mismatch` if the adapter of the file would not compute what the attached one does."""
    own = json.loads(json.dumps(config.to_dict(), default=_listed))
    kind = stored.get("peft_type")
    if kind != own["peft_type"]:
        problem = f"it holds an adapter of type {kind}, but {own['peft_type']} is attached"
        raise LuthierError("artifact-mismatch", problem, where=where, remedy="Attach the method that was saved.")
    other = {name: stored[name] for name in own if name in stored and _counts(name) and stored[name] != own[name]}
    if other:
        expected = ", ".join(f"{name} {own[name]}" for name in other)
        problem = f"it was trained with other options than the attached adapter has ({expected})"
        raise LuthierError("artifact-mismatch", problem, where=where, found=other, remedy="Use the options found.")


def put(handle: PeftModel, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into the attached adapter. Each must be used, and each trained parameter must be given."""
    own = get_peft_model_state_dict(handle, save_embedding_layers=False)
    tensors = drop_base_copies(handle.get_base_model(), tensors, own.keys(), where)
    try:
        result: Any = set_peft_model_state_dict(handle, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        problem = f"it does not fit the attached adapter: {text}"
        raise LuthierError("artifact-mismatch", problem, where=where, remedy=FITS) from error
    if result.unexpected_keys:
        names = sorted(result.unexpected_keys)
        problem = f"{len(names)} tensor(s) of the file have no place in the attached adapter"
        raise LuthierError("artifact-mismatch", problem, where=where, found=names[0], remedy=FITS)
    lacking = _lacking(handle, set(result.missing_keys))
    if lacking:
        problem = f"{len(lacking)} tensor(s) of the attached adapter are not in the file"
        raise LuthierError("artifact-mismatch", problem, where=where, found=lacking[0], remedy=FITS)


def _lacking(handle: PeftModel, missing: set[str]) -> list[str]:
    """Return trained parameters without a tensor. A shared one has several names, of which the file has one."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in handle.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return [known[0] for known in names.values() if missing.issuperset(known)]


def copy_into(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors of the same names and shapes. Raises `checkpoint-corrupt` if they differ."""
    differing = sorted(own.keys() ^ given.keys()) or [n for n in own if own[n].shape != given[n].shape]
    if differing:
        problem = "the checkpoint holds other tensors than the adapter"
        raise LuthierError("checkpoint-corrupt", problem, where=where, found=differing[0])
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def _counts(name: str) -> bool:
    """Return True if a setting changes what a trained adapter computes."""
    return name not in FREE and "dropout" not in name and (name == "init_r" or not name.startswith(("init", "save_")))


def _listed(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)
