"""Copies of the model whose gradients are added once backward is over.

They are for weights that are replaced by wider ones while they are stepped (`pure_bf16`): DDP's hooks belong to the
memory that a parameter had when it was wrapped, and would be silently lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luthier.distributed.spread import Spread
from luthier.distributed.world import World, lost_peers

BUCKET: Final = 1 << 24  # numbers in one message, 64 MiB in float32


def plain_copies(step: nn.Module, world: World) -> Spread:
    """Return `Step` unwrapped, with its weights and buffers set to rank 0's."""
    with torch.no_grad(), lost_peers():
        for tensor in (*step.parameters(), *step.buffers()):
            raw = tensor.detach().contiguous()
            dist.broadcast(raw.flatten().view(torch.uint8), src=0)
            tensor.copy_(raw)
    trained = [p for p in step.parameters() if p.requires_grad]
    return Spread(module=step, world=world, strategy="ddp", finish=lambda: add_up(trained, world))


def add_up(trained: Sequence[nn.Parameter], world: World) -> None:
    """Add each gradient over the ranks, in float32 or wider. A parameter that no rank has reached keeps no gradient."""
    reached = [any(flags) for flags in zip(*world.gather([p.grad is not None for p in trained]), strict=True)]
    for parameter in (p for p, is_reached in zip(trained, reached, strict=True) if is_reached and p.grad is None):
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in trained if p.grad is not None]
    for bucket in _buckets(gradients):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = torch.cat([gradient.flatten().to(dtype) for gradient in bucket])
        with lost_peers():
            dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.numel() for g in bucket) + gradient.numel() > BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
