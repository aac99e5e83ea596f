"""State trees on disk: tensors to safetensors, everything else to JSON, both by path; no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from luthier.errors import LuthierError

TENSORS: Final = "state.safetensors"
VALUES: Final = "state.json"
TENSOR: Final = "__tensor__"  # marks, in the JSON, where a tensor stood
KEYED: Final = "__items__"  # a mapping whose keys are not all text


def save_state(tree: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a tree of mappings, lists, tensors, numbers, texts and None; tensors that share memory are written once.

    Raises `checkpoint-state` naming the path of anything else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    values = _strip(tree, "", tensors, {})
    save_file(tensors, folder / TENSORS)
    (folder / VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return [folder / TENSORS, folder / VALUES]


def load_state(folder: Path) -> dict[str, Any]:
    """The tree that `save_state` wrote, its tensors with the dtype they had, in fresh memory on the CPU."""
    from safetensors.torch import load_file

    tensors = load_file(folder / TENSORS)
    return _fill(json.loads((folder / VALUES).read_text("utf-8")), tensors)


def _strip(node: Any, path: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(node, Tensor):
        return {TENSOR: _keep(node, path, tensors, seen)}
    if isinstance(node, Mapping):
        if all(isinstance(k, str) and not k.startswith("__") for k in node):
            return {k: _strip(v, f"{path}/{k}" if path else k, tensors, seen) for k, v in node.items()}
        return {KEYED: [[k, _strip(v, f"{path}/{k}", tensors, seen)] for k, v in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_strip(v, f"{path}/{i}", tensors, seen) for i, v in enumerate(node)]
    if isinstance(node, float) and not math.isfinite(node):
        return {"__float__": str(node)}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise LuthierError("checkpoint-state", f"{type(node).__name__} is neither tensor nor JSON", where=path)


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> str:
    kept = tensor.detach()
    key = (kept.data_ptr(), kept.dtype, tuple(kept.shape), kept.stride())
    if kept.numel() and key in seen:
        return seen[key]
    seen[key] = path
    tensors[path] = kept.to("cpu", copy=True).contiguous()
    return path


def _fill(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_fill(v, tensors) for v in node]
    if not isinstance(node, dict):
        return node
    if TENSOR in node:
        return tensors[node[TENSOR]]
    if "__float__" in node:
        return float(node["__float__"])
    if KEYED in node:
        return {k: _fill(v, tensors) for k, v in node[KEYED]}
    return {k: _fill(v, tensors) for k, v in node.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer holds: for each parameter by number, and the settings of each group."""
    numbers = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    return {
        "state": {str(numbers[id(p)]): dict(held) for p, held in optimizer.state.items()},
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, held: Mapping[str, Any]) -> None:
    """Put it back with the dtypes it had; torch's own `load_state_dict` would cast to the parameters'."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    if len(held["groups"]) != len(optimizer.param_groups) or any(int(i) >= len(parameters) for i in held["state"]):
        raise LuthierError("checkpoint-corrupt", "the optimizer's groups differ from the checkpoint's")
    for group, saved in zip(optimizer.param_groups, held["groups"], strict=True):
        for name, value in saved.items():
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    optimizer.state.clear()
    for number, entries in held["state"].items():
        parameter = parameters[int(number)]
        optimizer.state[parameter] = {k: _placed(v, parameter) for k, v in entries.items()}


def _placed(value: Any, parameter: Tensor) -> Any:
    """Tensors go to their parameter's device; counters (0-d) stay on the CPU, where optimizers keep them."""
    if isinstance(value, Tensor) and (value.dim() or parameter.device.type == "cpu"):
        return value.to(parameter.device)
    return value
