"""Read and write the files of an adapter: `osft.safetensors` and `osft.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from luthier import LuthierError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier_osft import Osft
from luthier_osft.complement import complement_shapes
from luthier_osft.layers import OsftLayer, take_prefixed

CONFIG: Final = "osft.json"
WEIGHTS: Final = "osft.safetensors"
FROZEN: Final = "frozen."  # prefix of the names of frozen tensors
FITS: Final = "Use the base model and the options that it was trained with."
FORMAT: Final = 1


def save_adapter(
    folder: Path, options: Osft, layers: Mapping[str, OsftLayer], trained: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Write the tensors, and the shape and number of preserved directions of each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {**trained, **{FROZEN + name: tensor for name, tensor in frozen.items()}}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, folder / WEIGHTS)
    described = {
        name: {"shape": [layer.out_features, layer.in_features], "preserved": layer.rank}
        for name, layer in layers.items()
    }
    config = {"format": FORMAT, "form": options.form, "layers": described}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_adapter(
    folder: Path, options: Osft, layers: Mapping[str, OsftLayer]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trained and the frozen tensors, by their names in the model.

    Raises `artifact-not-found`, or `artifact-mismatch` for another form or other shapes of layers.
    """
    config, where = read_config(folder), str(folder / CONFIG)
    if config.get("form") != options.form:
        problem = f"the adapter is of form {config.get('form')!r}, the options say {options.form!r}"
        raise LuthierError("artifact-mismatch", problem, where=where, remedy=FITS)
    for name, layer in layers.items():
        described = config["layers"].get(name, {})
        shape, preserved = described.get("shape"), described.get("preserved")
        if preserved != layer.rank and options.rank_rule != "schedule":
            problem = f"{name} keeps {preserved} directions there, {layer.rank} by unfreeze_rank_ratio here"
            raise LuthierError("artifact-mismatch", problem, where=where, remedy=_name_ratio(config["layers"]))
        if shape != [layer.out_features, layer.in_features]:
            problem = f"{name} has shape {shape} there, {[layer.out_features, layer.in_features]} here"
            raise LuthierError("artifact-mismatch", problem, where=where, remedy=FITS)
    tensors = _read_tensors(folder / WEIGHTS)
    frozen = {n.removeprefix(FROZEN): tensor for n, tensor in tensors.items() if n.startswith(FROZEN)}
    for name in layers:
        held = count_preserved(take_prefixed(frozen, f"{name}."), layers[name])
        if held != config["layers"][name]["preserved"]:
            problem = f"the bases of {name} keep {held} directions, {CONFIG} says {config['layers'][name]['preserved']}"
            raise LuthierError("artifact-mismatch", problem, where=str(folder / WEIGHTS), remedy="Copy the file again.")
    return {n: tensor for n, tensor in tensors.items() if not n.startswith(FROZEN)}, frozen


def _name_ratio(layers: Mapping[str, Any]) -> str:
    """Return the advice to set the ratio that all layers of a file were trained with, if they had one."""
    shares = {round(1 - layer["preserved"] / min(layer["shape"]), 2) for layer in layers.values()}
    return FITS if len(shares) > 1 else f"Set the adapter's unfreeze_rank_ratio to {shares.pop():g}, as it was trained."


def is_later_task(folder: Path) -> bool:
    """Return True if the adapter of a folder holds weights that earlier tasks have left."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = file.keys()
    return any(name.startswith(FROZEN) and name.endswith(".before") for name in names)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of osft.json."""
    path = folder / CONFIG
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {CONFIG} in this folder", where=str(folder))
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if config["format"] != FORMAT or not isinstance(config["layers"], dict):
            raise LuthierError("artifact-mismatch", "it has another format", where=str(path), remedy=FITS)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"the file is damaged: {type(error).__name__}: {error}"
        raise LuthierError("file-damaged", problem, where=str(path)) from None
    return config


def is_frozen(name: str, layers: Mapping[str, OsftLayer]) -> bool:
    """Return True if a tensor of this name belongs to what `frozen` of a layer returns, in whichever task."""
    ends = [name.removeprefix(f"{layer}.") for layer in layers if name.startswith(f"{layer}.")]
    return any(end == "before" or end.startswith(("out.", "in.", "first_")) for end in ends)


def check_frozen(layers: Mapping[str, OsftLayer], given: Mapping[str, Tensor], where: str, code: str) -> None:
    """Raise `code` if the frozen tensors are not those of these layers, or not finite."""
    for name, layer in layers.items():
        own = take_prefixed(given, f"{name}.")
        for side, size in (("out", layer.out_features), ("in", layer.in_features)):
            bases = [tensor for key, tensor in own.items() if key in (f"{side}.basis", f"{side}.vectors")]
            if any(tensor.shape[0] != size for tensor in bases):
                problem = f"{name} has {size} {side} features here, {bases[0].shape[0]} there"
                raise LuthierError(code, problem, where=where, remedy=FITS)
        _check_own(name, _frozen_shapes(layer, own), own, where, code)
    known = tuple(f"{name}." for name in layers)
    unknown = sorted(name for name in given if not name.startswith(known))
    if unknown:
        raise LuthierError(code, "it has tensors of unknown layers", where=where, found=unknown[0], remedy=FITS)
    check_finite(given, where, code)


def count_preserved(own: Mapping[str, Tensor], layer: OsftLayer) -> int:
    """Return the number of directions to which the bases of a layer in a file are orthogonal; 0 without bases."""
    for side, size in (("out", layer.out_features), ("in", layer.in_features)):
        basis, factor = own.get(f"{side}.basis"), own.get(f"{side}.factor")
        if basis is not None and basis.dim() == 2:
            return size - basis.shape[1]
        if factor is not None and factor.dim() == 2:
            return factor.shape[0]
    return 0


def _frozen_shapes(layer: OsftLayer, own: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each frozen tensor that a layer needs, if it preserves what the tensors of a file say."""
    rank = count_preserved(own, layer)
    sizes = {"out": layer.out_features, "in": layer.in_features}
    sides = {f"{side}.{k}": s for side, size in sizes.items() for k, s in complement_shapes(size, rank).items()}
    first = {key: tuple(tensor.shape) for key, tensor in layer.frozen().items() if key.startswith("first_")}
    before = {"before": (layer.out_features, layer.in_features)} if "before" in own else {}
    return {**sides, **first, **before}


def _check_own(
    name: str, shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor], where: str, code: str
) -> None:
    """Raise `code` if a frozen tensor of the layer `name` is missing, unknown, or of another shape."""
    for problem, keys in (("lacks", shapes.keys() - own.keys()), ("has unknown", own.keys() - shapes.keys())):
        if keys:
            raise LuthierError(code, f"it {problem} tensors of {name}", where=where, found=min(keys), remedy=FITS)
    for key, shape in shapes.items():
        if tuple(own[key].shape) != shape:
            problem = f"{name}.{key} has shape {list(own[key].shape)}, the model's is {list(shape)}"
            raise LuthierError(code, problem, where=where, remedy=FITS)


def check_finite(given: Mapping[str, Tensor], where: str, code: str) -> None:
    """Raise `code` if a tensor, or this rank's shard of it, has a number that is not finite."""
    for name, tensor in given.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if not torch.isfinite(local).all():
            raise LuthierError(code, f"{name} holds NaN or infinity", where=where, remedy="Use an earlier checkpoint.")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise LuthierError("artifact-not-found", f"no {path.name} in this folder", where=str(path.parent))
    try:
        return load_file(path)
    except SafetensorError as error:
        problem = f"not a whole safetensors file: {error}"
        raise LuthierError("file-damaged", problem, where=str(path)) from None
