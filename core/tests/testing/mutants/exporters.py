"""Exporters: one that is sound, and those that break one rule each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from luthier import LuthierError

FILE = "weights.npz"


class Arrays:
    """Writes every weight as an array, and compares bit for bit."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        save = np.savez_compressed if self.options.compressed else np.savez
        save(folder / FILE, **{name: value.numpy() for name, value in model.state_dict().items()})

    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        held = np.load(folder / FILE)
        worst = max(
            float((torch.from_numpy(held[name]) - value).abs().max()) for name, value in model.state_dict().items()
        )
        if worst:
            raise LuthierError("artifact-mismatch", "a weight differs", where=str(folder), found=worst)
        return {"largest difference": worst}


class WritesNothing(Arrays):
    def export(self, model, tokenizer, folder):
        self.options.compressed

    def verify(self, model, tokenizer, folder):
        return {"largest difference": 0.0}


class ComparesNothing(Arrays):
    def verify(self, model, tokenizer, folder):
        np.load(folder / FILE)
        return {"largest difference": 0.0}


class ReadsNothing(Arrays):
    def export(self, model, tokenizer, folder):
        super().export(model, tokenizer, folder)
        self.kept = {name: value.clone() for name, value in model.state_dict().items()}

    def verify(self, model, tokenizer, folder):
        if any(not torch.equal(self.kept[name], value) for name, value in model.state_dict().items()):
            raise LuthierError("artifact-mismatch", "a weight differs")
        return {"largest difference": 0.0}


class TiesTheModel(Arrays):
    def export(self, model, tokenizer, folder):
        super().export(model, tokenizer, folder)
        model.config.use_cache = not model.config.use_cache


class RoundsTheModel(Arrays):
    def export(self, model, tokenizer, folder):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        super().export(model, tokenizer, folder)
