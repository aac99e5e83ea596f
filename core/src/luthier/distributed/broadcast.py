"""Sharing: a state tree that rank 0 has read, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.checkpoint.state_tree import rebuilt, snapshot
from luthier.distributed.shard_tensors import has_parts, whole
from luthier.distributed.world import World, lost_peers, wire

if TYPE_CHECKING:
    from luthier.step.setup import Setup


def shared(world: World, read: Callable[[], Any]) -> Any:
    """The tree of tensors and JSON values that `read` gives on rank 0, on every rank; its `LuthierError` as well."""
    if world.size == 1:
        return read()
    held: dict[str, Tensor] = {}

    def told() -> list[Any]:
        taken = snapshot({"tree": read()})
        held.update(taken.tensors)
        return [taken.values, [[name, list(t.shape), str(t.dtype)[6:]] for name, t in taken.tensors.items()]]

    values, listed = world.decide(told)
    for name, shape, dtype in listed:
        place = held[name] if world.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
        held[name] = _broadcast(place)
    return rebuilt(values, held)["tree"]


def exchange_trees(world: World, tree: Any) -> list[Any]:
    """Return the tree of tensors and JSON values of each rank, in the order of ranks, on every rank. Collective."""
    if world.size == 1:
        return [tree]
    own = snapshot({"tree": tree})
    listed = [[name, list(t.shape), str(t.dtype)[6:]] for name, t in own.tensors.items()]
    trees = []
    for rank, (values, names) in enumerate(world.gather([own.values, listed])):
        held = {}
        for name, shape, dtype in names:
            place = own.tensors[name] if rank == world.rank else torch.empty(shape, dtype=getattr(torch, dtype))
            held[name] = _broadcast(place, rank)
        trees.append(rebuilt(values, held)["tree"])
    return trees


def as_held(setup: Setup, tree: Any, folder: Path) -> Any:
    """A checkpoint's tree with its parts, where it was written in such; as shards, where the model is sharded."""
    if not has_parts(tree) and setup.spread.strategy != "fsdp":
        return tree
    from luthier.checkpoint.shards import returned

    return returned(setup, tree, folder)


def gathered(setup: Setup) -> dict[str, Any] | None:
    """The states of adapter and quantizer, whole: on rank 0, in host memory; None where they are whole here.

    Collective. On other ranks of a sharded model the tree has nothing in it.
    """
    if setup.spread.strategy != "fsdp":
        return None
    with setup.optimizer_part.evaluating():
        states = {"adapter": setup.adapter.state(), "quantizer": setup.quantizer.state()}
        return _gathered(states, setup.world.is_main)


def _gathered(node: Any, keep: bool) -> Any:
    if isinstance(node, Mapping):
        return {name: _gathered(value, keep) for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_gathered(value, keep) for value in node]
    if not isinstance(node, Tensor):
        return node
    all_of_it = whole(node.detach())
    return all_of_it.cpu() if keep else None


def _broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """One rank's bytes, whatever they mean."""
    raw = tensor.contiguous().flatten().view(torch.uint8).to(wire())
    with lost_peers():
        dist.broadcast(raw, src=source)
    return raw.cpu().view(tensor.dtype).reshape(tensor.shape)
