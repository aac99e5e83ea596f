"""The optimizers of bitsandbytes as parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from luthier import Group, LuthierError

from luthier_bitsandbytes import AdamW8bit, Lion8bit, PagedAdamW8bit
from luthier_bitsandbytes.library import bitsandbytes


class BnbOptimizer:
    """AdamW or Lion with 8-bit states. States of weights below 4,096 elements are float32."""

    separable = True

    def __init__(self, options: AdamW8bit | Lion8bit) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Return the optimizer. Raises `part-unsupported` for sharded weights, and for a paged one without a GPU."""
        o, parameters = self.options, [p for group in groups for p in group.parameters]
        if any(hasattr(p, "full_tensor") for p in parameters):
            remedy = "Use optimizer adamw, or train on one device or with DDP."
            raise LuthierError(
                "part-unsupported", "bitsandbytes' optimizers cannot step sharded weights", remedy=remedy
            )
        settings = [group.settings(o.weight_decay) for group in groups]
        if isinstance(o, Lion8bit):
            made = bitsandbytes.optim.Lion8bit(settings, lr=1.0, betas=o.betas)
        elif isinstance(o, PagedAdamW8bit):
            _check_pages(parameters)
            made = bitsandbytes.optim.PagedAdamW8bit(settings, lr=1.0, betas=o.betas, eps=o.eps)
        else:
            made = bitsandbytes.optim.AdamW8bit(settings, lr=1.0, betas=o.betas, eps=o.eps)
        return made

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()


def _check_pages(parameters: list[torch.nn.Parameter]) -> None:
    if any(not p.is_cuda for p in parameters):
        problem = "optimizer 'bnb.paged_adamw_8bit' pages from a GPU, but these weights are not on one"
        remedy = "Use paged_adamw of luthier-optimizers, which keeps its states in a file, or bnb.adamw_8bit."
        raise LuthierError("part-unsupported", problem, where="optimizer", remedy=remedy)
