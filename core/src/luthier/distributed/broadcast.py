"""Sharing of a state tree: rank 0 reads it, and every rank gets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.distributed.world import World, lost_peers, wire_device
from luthier.state_tree import rebuild_tree, take_snapshot


def broadcast_tree(world: World, read: Callable[[], Any]) -> Any:
    """Return on every rank the tree of tensors and JSON values that `read` returns on rank 0, or raise its error."""
    if world.size == 1:
        return read()
    tensors: dict[str, Tensor] = {}

    def read_first() -> list[Any]:
        taken = take_snapshot({"tree": read()})
        tensors.update(taken.tensors)
        return [taken.values, [[name, list(t.shape), str(t.dtype)[6:]] for name, t in taken.tensors.items()]]

    values, listed = world.decide(read_first)
    for name, shape, dtype in listed:
        place = tensors[name] if world.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
        tensors[name] = _broadcast(place)
    return rebuild_tree(values, tensors)["tree"]


def exchange_trees(world: World, tree: Any) -> list[Any]:
    """Return the tree of tensors and JSON values of each rank, in the order of ranks, on every rank. Collective."""
    if world.size == 1:
        return [tree]
    own = take_snapshot({"tree": tree})
    listed = [[name, list(t.shape), str(t.dtype)[6:]] for name, t in own.tensors.items()]
    trees = []
    for rank, (values, names) in enumerate(world.gather([own.values, listed])):
        tensors = {}
        for name, shape, dtype in names:
            place = own.tensors[name] if rank == world.rank else torch.empty(shape, dtype=getattr(torch, dtype))
            tensors[name] = _broadcast(place, rank)
        trees.append(rebuild_tree(values, tensors)["tree"])
    return trees


def _broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Return one rank's tensor on every rank, sent as plain bytes."""
    raw = tensor.contiguous().flatten().view(torch.uint8).to(wire_device())
    with lost_peers():
        dist.broadcast(raw, src=source)
    return raw.cpu().view(tensor.dtype).reshape(tensor.shape)
