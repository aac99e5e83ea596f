"""Read and write trained parameters: selective.json describes them, selective.safetensors holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier import LuthierError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: Final = "selective.json"
WEIGHTS: Final = "selective.safetensors"
FITS: Final = "Use the base model and the options that it was trained with."


def save_tensors(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write both files, each tensor in its own dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in state.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors. Raises `artifact-not-found`, `file-damaged`, or `artifact-mismatch` for other options."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise LuthierError("artifact-not-found", f"no {name} in this folder", where=str(folder))
    try:
        file_config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise LuthierError("file-damaged", f"not JSON: {error}", where=str(folder / CONFIG)) from None
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise LuthierError(
            "file-damaged", f"not a whole safetensors file: {error}", where=str(folder / WEIGHTS)
        ) from None
    for key in ("method", "token_ids"):
        if not isinstance(file_config, dict) or file_config.get(key) != config[key]:
            was = file_config.get(key) if isinstance(file_config, dict) else file_config
            raise _misfit(folder, f"the adapter has {key} {was!r}, the options {config[key]!r}")
    return tensors


def _misfit(folder: Path, problem: str, remedy: str = FITS) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(folder), remedy=remedy)
