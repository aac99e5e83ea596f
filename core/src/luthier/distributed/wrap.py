"""Wrapping: which of torch's wrappers spreads the step over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luthier.distributed.spread import Spread, Strategy
from luthier.distributed.world import World


def wrap_step(
    step: nn.Module, model: Any, strategy: Strategy, world: World, device: torch.device, *, exchanged: bool = False
) -> Spread:
    """`Step` spread over the world; before the optimizer is built, as FSDP2 puts shards in the parameters' place.

    `exchanged`: whether the weights' memory is another while they are stepped.
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
