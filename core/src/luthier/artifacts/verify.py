"""Verification: what was saved is loaded again, and must give the outputs of the model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.attention import generating_attention
from luthier.model.generation.generation_inputs import compute_logits
from luthier.model.load import read_model
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.step.opened import names_everything, open_adapter, read_trained

log = get_logger()
LENGTH = 16


def check_adapter(model: Any, adapter: Adapter, folder: Path, note: Mapping[str, Any]) -> None:
    """Raise `artifact-mismatch` if a fresh adapter with these files, on a fresh base, has other outputs.

    If the base or a part is an object from Python, which no note can restore, the files are loaded into a copy of the
    model whose trained weights are replaced by random ones. The live model stays unchanged.
    """
    if names_everything(note):
        after = compute_where_it_fits(lambda device: _opened_logits(folder, note, device), model.device)
    else:
        copies = copy.deepcopy((model, adapter))
        _redraw(copies[1])
        copies[1].load(folder)
        after = _logits(*copies)
    _compare(_logits(model, adapter), after, folder)


def compute_where_it_fits(compute: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
    """Return what is computed on the device, or on the CPU if the device has no room for a second model."""
    try:
        return compute(device)
    except torch.OutOfMemoryError:
        log.info("the artifact is compared on the CPU", because="the device has no room for a second model")
    return compute(torch.device("cpu"))


def _opened_logits(folder: Path, note: Mapping[str, Any], device: torch.device) -> Tensor:
    opened = open_adapter(folder, note, device)
    return _logits(opened.model, opened.adapter)


@torch.no_grad()
def _redraw(adapter: Adapter) -> None:
    """Fill every trained weight with random numbers, so that a weight which is not read from the files is noticed."""
    random = torch.Generator().manual_seed(0)
    for group in adapter.groups():
        for parameter in group.parameters:
            drawn = torch.randn(parameter.shape, generator=random)
            parameter.copy_(drawn.to(parameter.device, parameter.dtype))


def check_model(model: Any, folder: Path, adapter: Any = None) -> float:
    """Raise `artifact-mismatch` if a fresh model of plain transformers, read from the folder, has other logits.

    The rounding of the files' dtype is allowed for. Returns the error relative to the logits' size.
    """

    def compute(device: torch.device) -> Tensor:
        return _logits(read_model(folder, model.dtype).to(device))

    return _compare(_logits(model, adapter), compute_where_it_fits(compute, model.device), folder, _low(folder))


def gives_numbers(model: Any, adapter: Adapter) -> bool:
    """Return whether the logits of the tokens that are compared here are finite."""
    return bool(_logits(model, adapter).isfinite().all())


def measure_error(model: Any, other: Any, adapter: Any = None) -> float:
    """Return how far another model's logits are from those of the model with its adapter, relative to their size."""
    return _error(_logits(model, adapter), _logits(other))


def _low(folder: Path) -> torch.dtype | None:
    """Return a dtype of the files that rounds; None if all floating tensors are in float32 or float64."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if file.get_slice(name).get_dtype() in ("BF16", "F16"):
                    return torch.bfloat16
    return None


def check_trained(model: Any, folder: Path, note: dict[str, Any], quantizer: Quantizer) -> None:
    """Raise `artifact-mismatch` if a fresh model, read from the folder by its quantizer, has other logits.

    A quantizer from Python, which no note can restore, is copied without the model that it belongs to.
    """
    parts: list[Any] = [*model.modules(), *model.parameters(), *model.buffers()]
    other = quantizer if "name" in note["quantizer"] else copy.deepcopy(quantizer, {id(part): part for part in parts})
    fresh = read_trained(folder, note, model.device, other)[0]
    _compare(_logits(model), _logits(fresh), folder)


def _logits(model: Any, adapter: Any = None) -> Tensor:
    """Return logits [LENGTH, V] of fixed random tokens, from the model's own forward pass, as in generation."""
    size = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, size, (LENGTH,), generator=torch.Generator().manual_seed(0)).to(model.device)
    with generating_attention(model):
        return compute_logits(model, tokens, adapter)


def _compare(before: Tensor, after: Tensor, folder: Path, dtype: torch.dtype | None = None) -> float:
    exact = (torch.float32, torch.float64)
    rounds = before.dtype not in exact or (dtype is not None and dtype not in exact) or before.device != after.device
    bound = 5e-2 if rounds else 1e-4
    error = _error(before, after.to(before.device))
    if not error <= bound:
        problem = f"its outputs differ from the model in memory by {error:.2g} of their size, more than {bound}"
        raise LuthierError("artifact-mismatch", problem, where=str(folder))
    return error


def _error(before: Tensor, after: Tensor) -> float:
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-6))
