"""The dense layers of a model that a quantizer takes, and what of a model it refuses."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

    from luthier.plugins.contracts.values import Context


def choose_dense_layers(
    model: nn.Module, name: str, skip_modules: Collection[str], exact: Collection[str] = ()
) -> dict[str, nn.Linear | Conv1D]:
    """Return path -> layer, for every dense layer that a quantizer called `name` may take.

    Those are all of exactly `torch.nn.Linear` or transformers' `Conv1D`, for a subclass may compute something else,
    but for the output head, layers that share their weight with another module, those whose path ends in a word of
    `exact`, and those that are or lie within a module of `skip_modules`, given by whole parts of its path. A layer
    that is used in two places stands here twice.

    Raises `model-target` where an entry of `skip_modules` names no module, `part-unsupported` where the checkpoint is
    quantized already.
    """
    from transformers.pytorch_utils import Conv1D

    _check_dense(model, name)
    places = list(model.named_modules(remove_duplicate=False))
    paths = [path for path, _ in places]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left = {path for path, module in places if module is head or path.rpartition(".")[2] in exact}
    left.update(*(_find_within(entry, paths, f"{name}.skip_modules") for entry in skip_modules))
    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    return {
        path: cast("nn.Linear | Conv1D", module)
        for path, module in places
        if type(module) in (nn.Linear, Conv1D) and path not in left and owners[id(module.weight)] == 1
    }


def replace_dense_layers(
    model: nn.Module,
    context: Context,
    name: str,
    skip_modules: Collection[str],
    kind: type[nn.Module],
    make: Callable[[Any], nn.Module],
    code: str,
) -> int:
    """Replace the layers of `choose_dense_layers` by what `make(layer)` returns, in place; return how many were made.

    `kind` is the class of those layers: if the model has some already and nothing is left to replace, nothing changes.
    A layer that is used in two places stays one layer, and progress is shown. Raises what `choose_dense_layers` raises,
    `part-unsupported` where no layer is chosen and none is there, and `code` where a weight holds NaN or infinity.
    """
    chosen = choose_dense_layers(model, name, skip_modules)
    if not chosen and not any(isinstance(module, kind) for module in model.modules()):
        problem = f"quantizer '{name}' finds no linear layer to quantize"
        raise LuthierError("part-unsupported", problem, where=type(model).__name__)
    if context.has_values:
        check_finite_weights(chosen, code)
    advance = context.progress(len(chosen), f"quantizing to {name}")
    made: dict[int, nn.Module] = {}
    for path, layer in chosen.items():
        if id(layer) not in made:
            made[id(layer)] = make(layer)
        model.set_submodule(path, made[id(layer)])
        advance()
    return len(made)


def check_finite_weights(layers: Mapping[str, nn.Module], code: str) -> None:
    """Raise an error of this code at the path of the first layer whose weight holds NaN or infinity."""
    for path, layer in layers.items():
        if not torch.isfinite(layer.weight).all():  # type: ignore[arg-type]  # a dense layer's is a tensor
            remedy = "Check the checkpoint, or leave the layer exact with skip_modules."
            raise LuthierError(code, "a weight is NaN or infinite", where=path, remedy=remedy)


def _find_within(entry: str, paths: Sequence[str], where: str) -> set[str]:
    matches = {path for path in paths if path and f".{entry}." in f".{path}."}
    if not matches:
        near = difflib.get_close_matches(entry, {part for path in paths for part in (path, *path.split("."))} - {""})
        remedy = f"Near misses: {', '.join(near)}." if near else "Print the model to see the names of its modules."
        raise LuthierError("model-target", f"{entry!r} names no module", where=where, remedy=remedy)
    return matches


def _check_dense(model: nn.Module, name: str) -> None:
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", config)
        remedy = "Use quantizer: none with it, or begin from the checkpoint that it was made of."
        problem = f"quantizer '{name}' needs dense weights, and the checkpoint is quantized already"
        raise LuthierError("part-unsupported", problem, where="quantizer", found=str(getattr(method, "value", method)),
                           remedy=remedy)  # fmt: skip
