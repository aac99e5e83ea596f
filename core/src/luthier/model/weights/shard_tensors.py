"""Tensors that may be shards: a DTensor is told by its `full_tensor`; a process alone need not import torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from torch import Tensor

MARK: Final = "__shard__"  # marks in a checkpoint's tree the place of a tensor that ranks have written in parts


def is_shard(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every rank. For a shard this is a collective."""
    return cast(Any, tensor).full_tensor() if is_shard(tensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return cast(Any, tensor).to_local() if is_shard(tensor) else tensor


def take_rows(given: Tensor, shard: Tensor) -> Tensor:
    """Return this rank's rows of a whole tensor, if `shard` is sharded by rows; else the whole tensor."""
    if not is_shard(shard):
        return given
    mesh: Any = cast(Any, shard).device_mesh
    rows = -(-shard.shape[0] // mesh.size())
    first = mesh.get_local_rank() * rows
    return given[first : first + own_shard(shard).shape[0]]


def is_sharded(tree: Any) -> bool:
    """Return True if a tree of mappings and lists holds a shard."""
    if isinstance(tree, Mapping):
        return any(is_sharded(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return any(is_sharded(value) for value in tree)
    return is_shard(tree)


def has_parts(tree: Any) -> bool:
    """Return True if a checkpoint's tree lacks tensors that lie beside it in parts."""
    if isinstance(tree, Mapping):
        return MARK in tree or any(has_parts(value) for value in tree.values())
    return any(has_parts(value) for value in tree) if isinstance(tree, list) else False
