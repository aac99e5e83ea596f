"""Handed models: one that a caller has loaded is named as an artifact's base only if it is what its config names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.foreign import explain_reading
from luthier.model.load import cached_folder
from luthier.model.weights.recomputed_buffers import find_recomputed
from luthier.recipe import Recipe, resolve_parts
from luthier.recipe.objects import Objects

log = get_logger()


@contextmanager
def left_as_given(model: Any) -> Iterator[None]:
    """Give a handed model back as it came, whatever is attached to it now: its modes, which of its parameters take a
    gradient, and none left."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for name, module in model.named_modules():
            known = name
            while known not in modes:  # a module that was attached has the mode of the module that contains it
                known = known.rpartition(".")[0]
            module.training = modes[known]
        for parameter, requires in wanted:
            parameter.requires_grad_(requires)
        for parameter in model.parameters():
            parameter.grad = None


def name_base(recipe: Recipe, objects: Objects) -> Recipe:
    """Return the recipe with `python:` as its model where a handed model is not the checkpoint that its config names.

    Raises `recipe-conflict` for an adapter on a model of other sizes: it would be opened on that checkpoint.
    """
    model, name = objects.model, recipe.model.name_or_path
    folder = cached_folder(name)
    if model is None or not hasattr(model, "state_dict") or not any(folder.glob("*.safetensors")):
        return recipe
    resized = next(_resized(model, folder), None)
    part = resolve_parts(recipe).adapter
    if resized is not None and getattr(part.record or part.local, "artifact", "adapter") == "adapter":
        problem = f"it is not the checkpoint that its config names, {folder}, on which the adapter would be opened"
        remedy = "Save model and tokenizer to a folder with save_pretrained, and give that folder as model."
        raise LuthierError("recipe-conflict", problem, where="model", found=resized, remedy=remedy)
    changed = resized or next(itertools.chain(_changed(model, folder), find_recomputed(model)), None)
    if changed is None:
        return recipe
    base = f"python:{type(model).__name__}"
    log.warning("the model is not the checkpoint that its config names", named=name, weight=changed, base=base)
    return attrs.evolve(recipe, model=attrs.evolve(recipe.model, name_or_path=base))


def _resized(model: Any, folder: Path) -> Iterator[str]:
    """Yield each weight whose size is another in the folder's files."""
    for name, own, stored_slice in _pairs(model, folder):
        shape = list(stored_slice.get_shape())
        if shape != list(own.shape):
            yield f"{name} {list(own.shape)}, there {shape}"


@torch.no_grad()
def _changed(model: Any, folder: Path) -> Iterator[str]:
    """Yield each weight whose numbers are others in the folder's files, in the dtype that the model has."""
    for name, own, stored_slice in _pairs(model, folder):
        if not torch.equal(own.cpu(), stored_slice[...].to(own.dtype)):
            yield name


def _pairs(model: Any, folder: Path) -> Iterator[tuple[str, Tensor, Any]]:
    """Yield name, weight and slice of the file, for each weight that has the same name in the folder's files."""
    from safetensors import safe_open

    state = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        with explain_reading(path), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name in state and state[name].is_floating_point() and not state[name].is_meta:
                    yield name, state[name], file.get_slice(name)
