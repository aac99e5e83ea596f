"""Base copies: the embedding and head that PEFT adds to an adapter's file, checked against the model.

PEFT does so (`save_embedding_layers`) where the base has got rows for new tokens after it was loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError

PREFIX: Final = "base_model.model."
PLACES: Final = ("", "base_layer.", "token_adapter.base_layer.")  # where PEFT's wrappers keep a base layer
WRAPPED: Final = ("base_layer", "original_module")  # attributes of wrappers, ours and PEFT's


def drop_base_copies(model: Any, tensors: Mapping[str, Tensor], own: Collection[str], where: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file in PEFT's layout without its copies of the model's embedding and head.

    `own` are the names that the attached adapter has itself, which stay. Raises `artifact-mismatch` if a copy has
    another shape than the model's weight, or other numbers; of a model without numbers only shapes are compared.
    """
    left = dict(tensors)
    for name, weight in _base_weights(model):
        if name in left and name not in own:
            _check_copy(name, left.pop(name), weight, where)
    return left


def _base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each name that PEFT may give a weight or bias of the embedding and the head, and the tensor."""
    both = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    for path, module in model.named_modules():
        if any(module is one for one in both):
            for part, tensor in _unwrapped(module).named_parameters(recurse=False):
                yield from ((f"{PREFIX}{path}.{place}{part}", tensor) for place in PLACES)


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = next((module._modules[name] for name in WRAPPED if name in module._modules), None)
    return module if inner is None else _unwrapped(inner)


def _check_copy(name: str, copy: Tensor, weight: Tensor, where: str) -> None:
    if copy.shape != weight.shape:
        problem = f"{name} has shape {list(copy.shape)}, the model's is {list(weight.shape)}"
        remedy = "Use the base model that it was trained with."
        if copy.shape[1:] == weight.shape[1:]:
            rows = f"transformers' resize_token_embeddings({len(copy)})"
            remedy = f"Its base was resized: make the model as large with {rows}, save it to a folder, and give that."
        raise LuthierError("artifact-mismatch", problem, where=where, remedy=remedy)
    if weight.is_meta or getattr(weight, "has_no_data", False):
        return
    if not torch.equal(copy.to(weight.device, weight.dtype), weight.detach()):
        problem = "it brings other numbers for a weight of the base, as PEFT saves them where new rows were added"
        remedy = "Give the resized model that it was trained with."
        if "base_layer" not in name:  # nothing adapts it, so that it could be read as a module that trains
            path = name.removeprefix(PREFIX).rpartition(".")[0]
            remedy = f"{remedy[:-1]}, or read it by `lora` with {path} in modules_to_save."
        raise LuthierError("artifact-mismatch", problem, where=where, found=name, remedy=remedy)
