"""Wrapping: the choice of the torch wrapper that spreads the step over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luthier.distributed.spread import Spread, Strategy
from luthier.distributed.world import World


def wrap_step(
    step: nn.Module, model: Any, strategy: Strategy, world: World, device: torch.device, *, exchanged: bool = False
) -> Spread:
    """Return `Step` spread over the world. Call it before the optimizer is built, because FSDP2 replaces parameters.

    `exchanged` is True if the weights' memory is replaced while they are stepped.
    """
    if strategy == "ddp" and exchanged:
        from luthier.distributed.ddp_bf16 import plain_copies

        return plain_copies(step, world)
    if strategy == "ddp":
        from luthier.distributed.ddp import wrap_ddp

        return wrap_ddp(step, world)
    if strategy == "fsdp":
        from luthier.distributed.fsdp import shard_step

        return shard_step(step, model, world, device)
    return Spread(module=step)
