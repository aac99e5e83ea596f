"""State trees on disk: tensors to safetensors, everything else to JSON, both by path; no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.peft_files import FITS

TENSORS: Final = "state.safetensors"
VALUES: Final = "state.json"
TENSOR: Final = "__tensor__"  # marks in the JSON the place of a tensor
KEYED: Final = "__items__"  # marks a mapping whose keys are not all text
FLOAT: Final = "__float__"  # marks a number that JSON does not have
DTYPES: Final = frozenset(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "bool", "int64", "int32", "int16", "int8"),
        *("uint64", "uint32", "uint16", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
        "float8_e8m0fnu",
    )
)  # dtypes that safetensors stores unchanged


@attrs.frozen(kw_only=True)
class Snapshot:
    """A state tree at one moment: JSON `values`, and `tensors` by path in memory that nothing else writes to."""

    values: Any
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write the tree as two files in `folder`."""
        from safetensors.torch import save_file

        save_file(self.tensors, folder / TENSORS)
        (folder / VALUES).write_text(json.dumps(self.values, indent=1), encoding="utf-8")


def take_snapshot(tree: Mapping[str, Any], reuse: Mapping[str, Tensor] | None = None, *, copy: bool = True) -> Snapshot:
    """Copy a tree of mappings, lists, tensors, numbers, texts and None to host memory; shared tensors once.

    `reuse` holds the tensors of an earlier snapshot that is no longer needed: memory that is already there takes a
    fifth of the time. Without `copy`, what can be written from where it lies stays there: such a snapshot is written
    at once. Raises `checkpoint-state` naming the path of anything else.
    """
    copier = _Copier(reuse or {}, copy=copy)
    return Snapshot(values=copier.strip(tree, ""), tensors=copier.tensors)


def copy_state(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state tree whose tensors are in memory of their own."""
    return {name: _copied(value) for name, value in tree.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return copy_state(value)
    return [_copied(each) for each in value] if isinstance(value, (list, tuple)) else value


def save_state(tree: Mapping[str, Any], folder: Path) -> None:
    """Write a tree as `take_snapshot` takes it."""
    take_snapshot(tree).write(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """Return the tree that `save_state` wrote, its tensors with the dtype they had, in fresh memory on the CPU."""
    from safetensors.torch import load_file

    # safetensors maps the file into memory: a copy is aligned like torch's own memory, and outlives the file
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    return rebuild_tree(json.loads((folder / VALUES).read_text("utf-8")), tensors)


class _Copier:
    """Takes a tree apart; `tensors` are the copies, by the path they stood at."""

    def __init__(self, reuse: Mapping[str, Tensor], *, copy: bool) -> None:
        self.reuse, self.copy = reuse, copy
        self.tensors: dict[str, Tensor] = {}
        # it keeps the tensor alive, because its address could be used again otherwise
        self.seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def strip(self, node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            return {TENSOR: self._keep(node, path)}
        if isinstance(node, Mapping):
            return self._strip_mapping(node, path)
        if isinstance(node, (list, tuple)):
            return [self.strip(v, f"{path}/{i}") for i, v in enumerate(node)]
        if isinstance(node, float) and not math.isfinite(node):
            return {FLOAT: str(node)}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise _refused(path, f"{type(node).__name__} is neither tensor nor JSON")

    def _strip_mapping(self, node: Mapping[Any, Any], path: str) -> Any:
        if all(isinstance(k, str) and not k.startswith("__") for k in node):
            return {k: self.strip(v, f"{path}/{k}" if path else k) for k, v in node.items()}
        for key in node:
            if not (key is None or isinstance(key, (bool, int, float, str))) or key != key:  # noqa: PLR0124 - NaN
                raise _refused(f"{path}/{key}", f"a key of type {type(key).__name__} cannot be found again")
        return {KEYED: [[self.strip(k, path), self.strip(v, f"{path}/{k}")] for k, v in node.items()]}

    def _keep(self, tensor: Tensor, path: str) -> str:
        _check(tensor, path)
        detached = tensor.detach()
        key = (detached.device, detached.data_ptr(), detached.dtype, tuple(detached.shape), detached.stride())
        if detached.numel() and key in self.seen:
            return self.seen[key][0]
        while path in self.tensors:  # {"a/b": ...} and {"a": {"b": ...}} would give the same path
            path += "'"
        self.seen[key] = path, detached
        self.tensors[path] = self._copied(detached, self.reuse.get(path))
        return path

    def _copied(self, tensor: Tensor, place: Tensor | None) -> Tensor:
        if place is not None and (place.shape, place.dtype) == (tensor.shape, tensor.dtype):
            return place.copy_(tensor)
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if tensor.device.type == "cpu" and whole and not self.copy and not tensor.is_conj() and not tensor.is_neg():
            return tensor
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check(tensor: Tensor, path: str) -> None:
    if tensor.dtype not in DTYPES:
        raise _refused(path, f"a tensor of {tensor.dtype} has no place in safetensors")
    if tensor.layout != torch.strided or tensor.is_meta or type(tensor.detach()) is not Tensor:
        kind = "meta" if tensor.is_meta else f"{type(tensor).__name__} ({tensor.layout})"
        raise _refused(path, f"a {kind} tensor has no plain values to write")


def _refused(path: str, problem: str) -> LuthierError:
    return LuthierError("checkpoint-state", problem, where=path)


def rebuild_tree(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that a `Snapshot`'s values and tensors were taken from."""
    if isinstance(node, list):
        return [rebuild_tree(v, tensors) for v in node]
    if not isinstance(node, dict):
        return node
    if TENSOR in node:
        return tensors[node[TENSOR]]
    if FLOAT in node:
        return float(node[FLOAT])
    if KEYED in node:
        return {rebuild_tree(k, tensors): rebuild_tree(v, tensors) for k, v in node[KEYED]}
    return {k: rebuild_tree(v, tensors) for k, v in node.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what an optimizer holds: for each parameter by number, and the settings of each group.

    `host` lists, for each parameter elsewhere, the tensors that the optimizer keeps on the CPU.
    """
    numbers = {id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    states = {str(numbers[id(p)]): dict(state) for p, state in optimizer.state.items()}
    return {
        "kind": type(optimizer).__name__,
        "state": states,
        "host": {
            str(numbers[id(p)]): _on_host(state) for p, state in optimizer.state.items() if p.device.type != "cpu"
        },
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, settings: bool = True) -> None:
    """Put it back with the dtypes it had; torch's own `load_state_dict` would cast to the parameters'.

    Without `settings` the groups keep those that they have now. Raises `checkpoint-corrupt` if the checkpoint holds the
    state of another optimizer or of other groups; earlier checkpoints do not say of which optimizer theirs is.
    """
    kind = type(optimizer).__name__
    if state.get("kind", kind) != kind:
        remedy = "Name the optimizer that the run began with, or resume on a machine with as much memory."
        problem = f"the checkpoint holds the state of {state['kind']}, and the optimizer is {kind}"
        raise LuthierError("checkpoint-corrupt", problem, where="optimizer", remedy=remedy)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    if len(state["groups"]) != len(optimizer.param_groups) or any(int(i) >= len(parameters) for i in state["state"]):
        raise LuthierError("checkpoint-corrupt", "the optimizer's groups differ from the checkpoint's")
    for group, saved in zip(optimizer.param_groups, state["groups"] if settings else (), strict=settings):
        for name, value in saved.items():
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    optimizer.state.clear()
    for number, entries in state["state"].items():
        parameter, host = parameters[int(number)], state["host"].get(number, ())
        optimizer.state[parameter] = {
            name: value if name in host else _placed(value, parameter.device) for name, value in entries.items()
        }


def _on_host(state: Mapping[str, Any]) -> list[str]:
    return [name for name, value in state.items() if isinstance(value, Tensor) and value.device.type == "cpu"]


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_placed(v, device) for v in value]
    return {k: _placed(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Any], where: str, code: str) -> None:
    """Raise `code`, with `where` as its place, if a tensor is missing, unknown or of another shape."""
    for problem, names in (("lacks", expected.keys() - given.keys()), ("has unknown", given.keys() - expected.keys())):
        if names:
            raise LuthierError(code, f"{problem} {len(names)} tensors", where=where, found=min(names), remedy=FITS)
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            problem = f"{name} has shape {list(given[name].shape)}, the model's is {list(tensor.shape)}"
            raise LuthierError(code, problem, where=where, remedy=FITS)


@torch.no_grad()
def fill_tensors(state: Mapping[str, Tensor], given: Mapping[str, Any], where: str, code: str) -> None:
    """Copy tensors into those of the same names. If one does not fit, as in `check_tensors`, change nothing."""
    check_tensors(state, given, where, code)
    for name, tensor in state.items():
        tensor.copy_(given[name])
