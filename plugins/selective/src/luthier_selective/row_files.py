"""Read and write rows of tokens, where nothing else trains, in PEFT's layout (TRAINABLE_TOKENS)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PeftFields,
    TokenRows,
    drop_base_copies,
    fill_tensors,
    peft_misfit,
    read_peft_config,
    read_peft_tensors,
    write_peft_files,
)
from torch import Tensor

from luthier_selective import Modules

METHOD: Final = "TRAINABLE_TOKENS"
PREFIX: Final = "base_model.model."
ROWS: Final = ".trainable_tokens_delta"  # PEFT's name for the rows themselves; they are no difference
FIELDS: Final = PeftFields(
    kinds=(METHOD,),
    types={"target_modules": (list, str), "token_indices": (list,)},
    required=("token_indices",),
    neutral=("init_weights",),
    remedy="Use the adapter peft.trainable_tokens for it.",
)


def save_rows(folder: Path, base: str | None, token_ids: list[int], rows: Mapping[str, TokenRows]) -> None:
    """Write both files. `target_modules` has no tied head, which PEFT finds; its copy of the rows is written too."""
    tensors = {_name(path): one.rows.detach().to("cpu").contiguous().clone() for path, one in rows.items()}
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
    write_peft_files(folder, config, tensors)


def load_rows(folder: Path, model: Any, token_ids: list[int], rows: Mapping[str, TokenRows]) -> None:
    """Read a folder of ours or PEFT's into the rows of a model; there are none if anything else trains.

    An error changes nothing.

    PEFT trains the rows of the modules that it is told of, by default of the input embedding alone. Another module's
    rows are then those of the base.
    """
    config = _read_config(folder)
    if not rows:
        remedy = f"Set token_ids: {config['token_indices']} alone."
        raise peft_misfit(folder / PEFT_CONFIG, "it holds rows of tokens, and the options train something else", remedy)
    if config["token_indices"] != token_ids:
        problem = f"the adapter has the rows of tokens {config['token_indices']}, the options have {token_ids}"
        raise peft_misfit(folder / PEFT_CONFIG, problem, f"Set token_ids: {config['token_indices']}.")
    tensors = drop_base_copies(model, read_peft_tensors(folder), (), str(folder / PEFT_WEIGHTS))
    _check_targets(folder, config["target_modules"], tensors)
    owners = {path: one for path, one in rows.items() if one.owns}
    for path, tensor in _tied_rows(rows, tensors).items():
        if not torch.equal(tensor, tensors.setdefault(_name(path), tensor)):
            problem, remedy = "the tied head has other rows than the embedding", "Untie the base model's head first."
            raise peft_misfit(folder / PEFT_WEIGHTS, problem, remedy)
    base_rows = {_name(path): _base_rows(one) for path, one in owners.items()}
    state = {_name(path): one.rows.detach() for path, one in owners.items()}
    fill_tensors(state, {**base_rows, **tensors}, str(folder / PEFT_WEIGHTS), "artifact-mismatch")


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
            raise peft_misfit(folder / PEFT_WEIGHTS, f"it lacks the rows of {target}, which target_modules names")


def _matches(targets: object, target: str, path: str) -> bool:
    """Return True if a path fits a target that stands alone, which PEFT reads as a regular expression."""
    return isinstance(targets, str) and re.fullmatch(target, path) is not None


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_peft_config(folder, FIELDS)
    ids = config["token_indices"]
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        problem = f"token_indices is {ids!r}, not a list of token ids"
        raise peft_misfit(folder / PEFT_CONFIG, problem, "Copy the file again.")
    return {"target_modules": None, **config}
