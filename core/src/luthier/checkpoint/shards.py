"""Sharded state on the disk: each rank writes what it holds, by torch's checkpoint planner, as safetensors.

A state tree is split: what ranks hold in parts goes to `shards/`, the rest is the ordinary tree, which says where a
part stood. It comes back on any number of ranks: as shards of this world, or whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import attrs
import torch
import torch.distributed.checkpoint as planner
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from luthier.checkpoint import folder as checkpoint
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.model.weights.shard_tensors import MARK, has_parts, whole_tensor
from luthier.state_tree import Snapshot, take_snapshot

if TYPE_CHECKING:
    from luthier.plugins.contracts.protocols import Adapter, Optimizer, Quantizer

FOLDER: Final = "shards"


@attrs.define(kw_only=True, eq=False)
class ShardedSnapshot:
    """A state tree at one moment: this rank's parts in memory of their own, and on rank 0 the rest.

    `world` has a group of its own, so that any thread may write.
    """

    world: World
    tensors: dict[str, Tensor]  # this rank's copies, which the next checkpoint reuses
    parts: dict[str, Tensor]  # the same tensors as shards
    rest: Snapshot

    def write(self, run_folder: Path, step: int, belongs: Mapping[str, Any], constants: Iterable[str] = ()) -> Path:
        """Write a checkpoint of all ranks, complete or not at all; a collective. If one rank fails, all raise."""
        target = checkpoint.folder_of(run_folder, step)
        if not self.world.is_main:
            self._follow()
            return target
        try:
            checkpoint.write_checkpoint(run_folder, step, self._lead, belongs, constants)
        except BaseException:
            self.world.broadcast(None)  # all ranks wait until the folder exists, or has become a checkpoint
            raise
        self.world.broadcast(str(target))
        return target

    def _lead(self, aside: Path) -> None:
        self.world.broadcast(str(aside))
        try:
            self.rest.write(aside)
        except Exception as error:
            self._write_parts(aside, str(error))
            raise
        self._write_parts(aside)

    def _follow(self) -> None:
        """Write this rank's parts where rank 0 says, and wait until they belong to a checkpoint."""
        aside, done = self.world.broadcast(None), None
        if aside is not None:
            try:
                self._write_parts(Path(aside))
            finally:
                done = self.world.broadcast(None)
        if done is None:
            raise LuthierError("distributed-lost", "rank 0 could not write a checkpoint")

    def _write_parts(self, folder: Path, problem: str | None = None) -> None:
        """Nothing where a rank has a problem already: the planner would wait for it."""
        if any(self.world.gather(problem)):
            return
        writer = HuggingFaceStorageWriter(path=str(folder / FOLDER), save_distributed=True)
        planner.save(self.parts, storage_writer=writer, process_group=self.world.group)


def sharded_snapshot(
    tree: Mapping[str, Any], world: World, reuse: Mapping[str, Tensor] | None = None
) -> ShardedSnapshot:
    """Copy a tree that holds shards; collective where one is not sharded by rows. `reuse`: see `take_snapshot`."""
    mesh, shards = init_device_mesh("cpu", (world.size,)), dict[str, DTensor]()
    rest = take_snapshot(_split(tree, "", shards))
    known = reuse or {}
    tensors = {path: _copied(tensor.to_local(), known.get(path)) for path, tensor in shards.items()}
    parts: dict[str, Tensor] = {path: _as_shard(tensors[path], shard.shape, mesh) for path, shard in shards.items()}
    return ShardedSnapshot(world=world, tensors=tensors, parts=parts, rest=rest)


def returned(tree: dict[str, Any], folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a checkpoint's tree as this world holds it: its parts are read, and become shards where the model is."""
    live = [p for g in optimizer.param_groups for p in g["params"]]
    mesh = next((p.device_mesh for p in live if isinstance(p, DTensor)), None)
    tree = load_parts(tree, folder, mesh)
    if mesh is None:
        return tree
    own, optimizer_states = adapter.state(), tree["optimizer"]["state"]
    states = {i: {k: _like(v, live[int(i)]) for k, v in entries.items()} for i, entries in optimizer_states.items()}
    given = {name: _like(value, own.get(name)) for name, value in tree["adapter"].items()}
    return {**tree, "adapter": given, "optimizer": {**tree["optimizer"], "state": states}}


def load_parts(tree: Any, folder: Path, mesh: DeviceMesh | None) -> Any:
    """Return the tree with what lies in `folder` put back: as shards of `mesh`, or whole where it is None.

    Collective over the world, which may be another than that which wrote it.
    """
    wanted: dict[str, Tensor] = {}
    for path, shape, dtype in _marks(tree):
        wanted[path] = _empty(shape, getattr(torch, dtype), mesh)
    if wanted:
        alone = mesh is None and not torch.distributed.is_initialized()
        planner.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder / FOLDER)), no_dist=alone)
    return _joined(tree, wanted, mesh)


def distributed(tensor: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has whole, sharded as `like` is."""
    mesh, placements = like.device_mesh, like.placements
    if placements == (Replicate(),):
        return _replicated(tensor, mesh)
    rows = tensor.chunk(mesh.size())
    own = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else tensor[:0]
    return _as_shard(own.to(mesh.device_type, copy=True), tensor.shape, mesh)


def _split(node: Any, path: str, shards: dict[str, DTensor]) -> Any:
    if isinstance(node, DTensor):
        return _marked(node, path, shards)
    if isinstance(node, Mapping):
        return {key: _split(value, f"{path}/{key}" if path else str(key), shards) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_split(value, f"{path}/{i}", shards) for i, value in enumerate(node)]
    return node


def _marked(tensor: DTensor, path: str, shards: dict[str, DTensor]) -> Any:
    if tensor.placements == (Replicate(),):
        return {MARK: "replicated", "tensor": tensor.to_local()}
    if tensor.placements != (Shard(0),):
        tensor = tensor.redistribute(placements=(Shard(0),))
    shards[path] = cast(DTensor, tensor.detach())
    return {MARK: path, "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}


def _marks(node: Any) -> list[tuple[str, list[int], str]]:
    if isinstance(node, Mapping):
        if MARK in node:
            return [(node[MARK], node["shape"], node["dtype"])] if "shape" in node else []
        return [mark for value in node.values() for mark in _marks(value)]
    return [mark for value in node for mark in _marks(value)] if isinstance(node, list) else []


def _joined(node: Any, parts: Mapping[str, Tensor], mesh: DeviceMesh | None) -> Any:
    if isinstance(node, list):
        return [_joined(value, parts, mesh) for value in node]
    if not isinstance(node, Mapping):
        return node
    if MARK not in node:
        return {key: _joined(value, parts, mesh) for key, value in node.items()}
    if "shape" in node:
        return parts[node[MARK]]
    part = node["tensor"]
    return (
        part if mesh is None else DTensor.from_local(part.to(mesh.device_type), mesh, (Replicate(),), run_check=False)
    )


def _like(value: Any, live: Any) -> Any:
    """Return a whole tensor as a shard if its destination is a shard of the same shape."""
    fits = isinstance(live, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor)
    return distributed(value, live) if fits and value.shape == live.shape else value


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(tensor.to(mesh.device_type), mesh, (Replicate(),), run_check=False)


def _empty(shape: list[int], dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty(shape, dtype=dtype)
    rows = -(-shape[0] // mesh.size())
    mine = max(0, min(rows, shape[0] - mesh.get_local_rank() * rows))
    return _as_shard(torch.empty((mine, *shape[1:]), dtype=dtype, device=mesh.device_type), torch.Size(shape), mesh)


def _as_shard(local: Tensor, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    """Return the rows that `torch.chunk` gives this rank, as a shard of a tensor of `shape`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, (Shard(0),), run_check=False, shape=shape, stride=stride)


def _copied(tensor: Tensor, place: Tensor | None) -> Tensor:
    if place is not None and (place.shape, place.dtype) == (tensor.shape, tensor.dtype):
        return place.copy_(tensor)
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def as_held(tree: Any, folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, *, sharded: bool) -> Any:
    """Return a checkpoint's tree with the parts that it was written in; as shards, where the model is sharded."""
    return returned(tree, folder, adapter, optimizer) if sharded or has_parts(tree) else tree


def gather_states(adapter: Adapter, quantizer: Quantizer, part: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return the whole states of a sharded model's adapter and quantizer, in host memory, as the optimizer evaluates.

    This is a collective. Where `keep` is False, as on all ranks but one, the tree has nothing in it.
    """
    with part.evaluating():
        return _gathered({"adapter": adapter.state(), "quantizer": quantizer.state()}, keep)


def _gathered(node: Any, keep: bool) -> Any:
    if isinstance(node, Mapping):
        return {name: _gathered(value, keep) for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_gathered(value, keep) for value in node]
    if not isinstance(node, Tensor):
        return node
    all_of_it = whole_tensor(node.detach())
    return all_of_it.cpu() if keep else None
