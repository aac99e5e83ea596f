"""Fingerprint: whether the base model is the one that a run began with, without reading all of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from luthier.model.load import model_location

ENDS: Final = 1 << 16  # bytes read at both ends of each file of weights
SIZES: Final = ("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer")  # entries of config.json


def of_model(name: str) -> str | None:
    """16 hexadecimal digits over a model folder: its config, and the sizes and ends of its files of weights.

    None for a hub name, whose revision is part of the recipe, and for a model that was an object in Python.
    """
    if name.startswith("python:"):
        return None
    folder = Path(model_location(name))
    if not folder.is_dir():
        return None
    state = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            state.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            state.update(file.read(ENDS))
    return state.hexdigest()[:16]


def sizes_of(name: str) -> dict[str, int]:
    """Return the sizes that the config of a model folder here names; nothing for any other model."""
    path = Path(model_location(name)) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: config[key] for key in SIZES if isinstance(config, dict) and isinstance(config.get(key), int)}
