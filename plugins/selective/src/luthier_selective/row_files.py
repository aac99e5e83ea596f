"""Read and write rows of tokens, where nothing else trains, in PEFT's layout (TRAINABLE_TOKENS)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import LuthierError, TokenRows, drop_base_copies
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier_selective import Modules
from luthier_selective.files import FITS, fill_tensors

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
METHOD: Final = "TRAINABLE_TOKENS"
PREFIX: Final = "base_model.model."
ROWS: Final = ".trainable_tokens_delta"  # PEFT's name for the rows themselves; they are no difference
# fields that do not change what the tensors mean once their names and shapes fit
NEUTRAL: Final = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "init_weights", "peft_type", "peft_version"),
    *("revision", "target_modules", "task_type", "token_indices"),
}


def save_rows(folder: Path, base: str | None, token_ids: list[int], rows: Mapping[str, TokenRows]) -> None:
    """Write both files. `target_modules` has no tied head, which PEFT finds; its copy of the rows is written too."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_name(path): one.rows.detach().to("cpu").contiguous().clone() for path, one in rows.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    has_head = len(rows) > 1
    config = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": METHOD,
        "revision": None,
        "target_modules": [path for path, one in rows.items() if one.owns],
        "task_type": "CAUSAL_LM" if has_head else None,
        "token_indices": token_ids,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_rows(folder: Path, model: Any, token_ids: list[int], rows: Mapping[str, TokenRows]) -> None:
    """Read a folder of ours or PEFT's into the rows of a model; there are none if anything else trains.

    An error changes nothing.

    PEFT trains the rows of the modules that it is told of, by default of the input embedding alone. Another module's
    rows are then those of the base.
    """
    config = _read_config(folder)
    if not rows:
        remedy = f"Set token_ids: {config['token_indices']} alone."
        raise _misfit(folder / CONFIG, "it holds rows of tokens, and the options train something else", remedy)
    if config["token_indices"] != token_ids:
        problem = f"the adapter has the rows of tokens {config['token_indices']}, the options have {token_ids}"
        raise _misfit(folder / CONFIG, problem, f"Set token_ids: {config['token_indices']}.")
    tensors = drop_base_copies(model, _read_tensors(folder / WEIGHTS), (), str(folder / WEIGHTS))
    _check_targets(folder, config["target_modules"], tensors)
    owners = {path: one for path, one in rows.items() if one.owns}
    for path, tensor in _tied_rows(rows, tensors).items():
        if not torch.equal(tensor, tensors.setdefault(_name(path), tensor)):
            problem, remedy = "the tied head has other rows than the embedding", "Untie the base model's head first."
            raise _misfit(folder / WEIGHTS, problem, remedy)
    base_rows = {_name(path): _base_rows(one) for path, one in owners.items()}
    state = {_name(path): one.rows.detach() for path, one in owners.items()}
    fill_tensors(state, {**base_rows, **tensors}, str(folder / WEIGHTS), "artifact-mismatch")


def read_row_options(folder: Path) -> Modules:
    """Return the options with which the rows in this folder, ours or PEFT's, can be attached and loaded."""
    return Modules(token_ids=_read_config(folder)["token_indices"])


def _name(path: str) -> str:
    """Return the name in a file of the rows of a module."""
    return f"{PREFIX}{path}{ROWS}"


def _tied_rows(rows: Mapping[str, TokenRows], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the copies of tied heads out of a file's tensors, and return them by the path of the rows' owner."""
    owners = {id(one.rows): path for path, one in rows.items() if one.owns}
    tied = {path: owners[id(one.rows)] for path, one in rows.items() if not one.owns}
    return {owner: given.pop(_name(path)) for path, owner in tied.items() if _name(path) in given}


def _base_rows(module: TokenRows) -> Tensor:
    weight: Any = module.base_layer.weight
    return weight.detach()[module.ids]


def _check_targets(folder: Path, targets: str | list[str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise `artifact-mismatch` if the rows of a module that the configuration names are not in the file."""
    paths = [name.removeprefix(PREFIX).removesuffix(ROWS) for name in tensors]
    for target in [targets] if isinstance(targets, str) else targets or []:
        hits = [p for p in paths if p == target or p.endswith(f".{target}") or _matches(targets, target, p)]
        if not hits:
            raise _misfit(folder / WEIGHTS, f"it lacks the rows of {target}, which target_modules names")


def _matches(targets: object, target: str, path: str) -> bool:
    """Return True if a path fits a target that stands alone, which PEFT reads as a regular expression."""
    return isinstance(targets, str) and re.fullmatch(target, path) is not None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {CONFIG} in this folder", where=str(folder))
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise _misfit(path, f"not JSON: {error}", "Copy the file again.") from None
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if kind != METHOD:
        raise _misfit(path, f"peft_type is {kind!r}, not {METHOD!r}", "Use the adapter that made it.")
    for name in sorted(config.keys() - NEUTRAL):
        if config[name]:
            raise _misfit(path, f"it uses {name}: {config[name]!r}", "Use the adapter peft.trainable_tokens for it.")
    ids = config.get("token_indices")
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise _misfit(path, f"token_indices is {ids!r}, not a list of token ids", "Copy the file again.")
    return {"target_modules": None, **config}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        remedy = "Save it as safetensors: a .bin file is a pickle, which can run code." if pickled else None
        raise LuthierError("artifact-not-found", f"no {WEIGHTS} in this folder", where=str(path.parent), remedy=remedy)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _misfit(path, f"not a whole safetensors file: {error}", "Copy the file again.") from None


def _misfit(path: Path, problem: str, remedy: str = FITS) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(path), remedy=remedy)
