"""Files that hold a sample of a model's weights, compared with it: names, shapes, numbers, recomputed buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.model.foreign import explain_reading
from luthier.model.load import read_headers
from luthier.model.weights.recomputed_buffers import find_recomputed


def check_sample(model: Any, folder: Path, names: Collection[str]) -> None:
    """Raise `artifact-mismatch` if the model of a folder, which holds these weights alone, would be another.

    No weights are read but those of the sample. Without accelerate, shapes are not compared.
    """
    for finding in _find_differences(model, folder, names):
        raise LuthierError("artifact-mismatch", finding, where=str(folder))


def _find_differences(model: Any, folder: Path, names: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each difference, the cheapest to find first."""
    headers = read_headers(str(folder), "artifact-not-found")
    if headers is not None:
        yield from _compare_shapes(dict(model.named_parameters()), headers[0].state_dict())
        for name in sorted(set(headers[1]["missing_keys"]) & set(names)):
            yield f"{name} is written and not found again"
    yield from _compare_numbers(model.state_dict(), folder)
    for name in find_recomputed(model):
        yield f"{name} is in no file, and is made again with other numbers"


def _compare_shapes(own: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in own.items():
        if name not in read:
            yield f"{name} is no weight of the model that its config makes"
        elif tensor.shape != read[name].shape:
            yield f"{name} is {list(tensor.shape)}, and {list(read[name].shape)} in the model that its config makes"


@torch.no_grad()
def _compare_numbers(state: Mapping[str, Tensor], folder: Path) -> Iterator[str]:
    """Yield each weight whose numbers are others in the files; one that has another name there is not compared."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with explain_reading(path, "artifact-not-found"), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                own = state.get(name)
                if own is not None and not _equal(own.cpu(), file.get_tensor(name)):
                    yield f"{name} has other numbers when it is read back"


def _equal(own: Tensor, read: Tensor) -> bool:
    return own.shape == read.shape and torch.equal(own.to(read.dtype), read)
