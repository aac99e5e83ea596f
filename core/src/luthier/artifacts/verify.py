"""Verification: what was saved is loaded again and must give the outputs of the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.artifacts.opened import read_trained
from luthier.engine.attention import generating
from luthier.engine.load import read_model
from luthier.errors import LuthierError
from luthier.model.generation_inputs import compute_logits
from luthier.plugins.protocols import Quantizer

LENGTH = 16


def check_adapter(model: Any, adapter: Any, folder: Path) -> None:
    """The files, read back into the live adapter, leave its outputs as they were."""
    before = _logits(model, adapter)
    adapter.load(folder)
    _compare(before, _logits(model, adapter), folder)


def check_model(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """A fresh model of plain transformers, loaded from the folder, has the live model's logits.

    `dtype` is that of the files, whose rounding is allowed for; None: the live model's.
    """
    _compare(_logits(model), _logits(read_model(folder, model.dtype).to(model.device)), folder, dtype)


def check_trained(model: Any, folder: Path, note: dict[str, Any], quantizer: Quantizer) -> None:
    """A fresh model, read from the folder by its quantizer, has the live model's logits."""
    fresh = read_trained(folder, note, model.device, quantizer)[0]
    _compare(_logits(model), _logits(fresh), folder)


def _logits(model: Any, adapter: Any = None) -> Tensor:
    """[LENGTH, V] on fixed random tokens, by the model's own forward, as in generation."""
    size = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, size, (LENGTH,), generator=torch.Generator().manual_seed(0)).to(model.device)
    with generating(model):
        return compute_logits(model, tokens, adapter)


def _compare(before: Tensor, after: Tensor, folder: Path, dtype: torch.dtype | None = None) -> None:
    exact = (torch.float32, torch.float64)
    bound = 1e-4 if before.dtype in exact and (dtype is None or dtype in exact) else 5e-2
    error = float((before - after).abs().max() / before.abs().max().clamp_min(1e-6))
    if not error <= bound:
        problem = f"its outputs differ from the model in memory by {error:.2g} of their size, more than {bound}"
        raise LuthierError("artifact-mismatch", problem, where=str(folder))
