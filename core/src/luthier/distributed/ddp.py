"""DDP: a copy of the model in each process, whose gradients are reduced while backward runs.

Annotations are evaluated in this module, because DDP inspects those of its hook.
"""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from luthier.distributed.spread import Spread
from luthier.distributed.world import World


class Sought(nn.Module):
    """A module with `Step` and an unused parameter: DDP complains if it looks for unused parameters and finds none."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step
        trained = next(p for p in step.parameters() if p.requires_grad)
        self.unreached = nn.Parameter(torch.zeros(1, dtype=trained.dtype, device=trained.device))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.step(*arguments, **named)


def wrap_ddp(step: nn.Module, world: World) -> Spread:
    """Return `Step` wrapped by DDP. Weights and buffers are set to rank 0's.

    Which parameters a micro-batch reaches depends on its tokens (experts, say), so DDP looks for unused ones: a
    parameter that no rank reached keeps no gradient, as with one process.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    arguments: dict[str, Any] = {"find_unused_parameters": True, buffers: False}
    wrapped = DistributedDataParallel(Sought(step), **arguments)
    wrapped.register_comm_hook(None, summed)
    return Spread(module=wrapped, world=world, strategy="ddp")


def summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Add gradients over the ranks.

    DDP's own average would have to be multiplied again, and so be rounded once more.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
