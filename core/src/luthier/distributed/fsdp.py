"""FSDP2: each rank holds a shard of every weight, and gathers a decoder layer only while it computes with it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import register_pytree_node  # transformers registers its outputs in the same registry

from luthier.distributed.spread import Spread
from luthier.distributed.world import World, lost_peers
from luthier.errors import LuthierError
from luthier.model.weights.layers import decoder_layers
from luthier.model.weights.shard_tensors import own_shard
from luthier.plugins.contracts.values import LossOutput

# FSDP2 attaches the start of backward to the tensors that it finds in a module's output, so they must be found.
register_pytree_node(
    LossOutput,
    lambda output: ([output.sums, output.metrics], None),
    lambda values, _: LossOutput(**dict(zip(("sums", "metrics"), values, strict=True))),
)


def shard_step(step: nn.Module, model: nn.Module, world: World, device: torch.device) -> Spread:
    """Shard `Step` in place: one group for each decoder layer and one for the rest, with rank 0's numbers.

    The rest, with embeddings and head, stays gathered from forward to backward, because the policy calls the head
    outside of the layers, and again in backward. Gradients of a low precision are added in float32.
    """
    world.decide(lambda: None)  # the others wait here for as long as rank 0 reads the weights
    _check_alike(step, world)
    layers = list(decoder_layers(model))
    _check_apart(step, layers)
    whole_tensors = {name: tensor.detach() for name, tensor in _tensors(step)} if world.is_main else {}
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=_reduced_in(step), cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(step, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in step.modules():
        if isinstance(module, FSDPModule):
            _add_up(module)
    if any(own_shard(tensor).is_meta for _, tensor in _tensors(step)):
        step.to_empty(device=device)
    for name, tensor in _tensors(step):
        _hand_out(tensor, whole_tensors.pop(name, None), world)
    _check_kept(step)
    return Spread(module=step, world=world, strategy="fsdp")


def _add_up(module: FSDPModule) -> None:
    """Make FSDP2 add gradients as they come. A weight that only one rank reaches counts as zero on the others."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    if hasattr(module, "set_reduce_scatter_unused_params"):  # exists from torch 2.13 on
        module.set_reduce_scatter_unused_params(True, recurse=False)


def _tensors(step: nn.Module) -> list[tuple[str, Tensor]]:
    return [*step.named_parameters(), *step.named_buffers()]


def _check_alike(step: nn.Module, world: World) -> None:
    """Raise `distributed-setup` if ranks have built different models, and `part-unsupported` for a 0-d parameter."""
    mine = [[name, list(t.shape), str(t.dtype), t.requires_grad] for name, t in _tensors(step)]
    for rank, listed in enumerate(world.gather(mine)):
        other = next((a for a, b in zip(listed, mine, strict=False) if a != b), None)
        if other is not None or len(listed) != len(mine):
            problem = f"rank {rank} has built a different model than rank {world.rank}"
            raise LuthierError("distributed-setup", problem, found=other, remedy="Set distributed.strategy: ddp.")
    scalar = next((name for name, p in step.named_parameters() if not p.dim()), None)
    if scalar is not None:
        raise _unshardable(f"the parameter {scalar} is a single number")


def _check_apart(step: nn.Module, layers: list[nn.Module]) -> None:
    """Raise `part-unsupported` for a parameter with hooks, or shared by two groups, as FSDP2 gathers one at a time."""
    hooked = next((n for n, p in step.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks), None)
    if hooked is not None:
        raise _unshardable(f"the parameter {hooked} has hooks on its gradient, which shards do not have")
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = {id(p): n for m in step.modules() if id(m) not in inside for n, p in m.named_parameters(recurse=False)}
    seen = dict(outside)
    for layer in layers:
        own = {id(p): name for name, p in layer.named_parameters()}
        both = next((own[key] for key in own.keys() & seen.keys()), None)
        if both is not None:
            raise _unshardable(f"layers share the parameter {both}")
        seen |= own


def _check_kept(step: nn.Module) -> None:
    """Raise `part-unsupported` if the adapter still trains parameters that shards have replaced."""
    live = {id(p) for p in step.parameters()}
    groups = step.adapter.groups()  # type: ignore[operator,union-attr]
    named = [pair for group in groups for pair in zip(group.names, group.parameters, strict=True)]
    stale = next((name for name, parameter in named if id(parameter) not in live), None)
    if stale is not None:
        raise _unshardable(f"the adapter still refers to the parameter {stale}, which sharding has replaced")


def _unshardable(problem: str) -> LuthierError:
    return LuthierError("part-unsupported", problem, where="adapter", remedy="Set distributed.strategy: ddp.")


def _hand_out(tensor: Tensor, whole: Tensor | None, world: World) -> None:
    """Send each rank its rows of a weight that rank 0 has as `whole`, or all of a buffer, as plain bytes."""
    place = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not isinstance(tensor, DTensor):
        raw = _bytes(place if whole is None else whole.to(place.device))
        with lost_peers():
            dist.broadcast(raw, src=0)
        place.copy_(raw.view(place.dtype).reshape(place.shape))
        return
    rows = -(-tensor.shape[0] // world.size)
    room = place.new_empty((rows, *tensor.shape[1:]))
    parts = None if whole is None else [_bytes(part) for part in _filled(whole.to(place.device), rows, world.size)]
    with lost_peers():
        dist.scatter(received := _bytes(room), parts, src=0)
    with torch.no_grad():
        place.copy_(received.view(place.dtype).reshape(room.shape)[: place.shape[0]])


def _filled(whole: Tensor, rows: int, count: int) -> list[Tensor]:
    """Return `count` pieces of `rows` rows each. Rows beyond the end of the tensor are arbitrary and never read."""
    wanting = rows * count - whole.shape[0]
    padded = torch.cat([whole, whole.new_zeros((wanting, *whole.shape[1:]))]) if wanting else whole
    return list(padded.split(rows))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _reduced_in(step: nn.Module) -> torch.dtype | None:
    trained = {p.dtype for p in step.parameters() if p.requires_grad}
    return torch.float32 if trained & {torch.bfloat16, torch.float16} else None
