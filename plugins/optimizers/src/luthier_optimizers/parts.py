"""The optimizer part `adamw_8bit`: it makes the optimizer of a run over the groups that the adapter gives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from luthier import Group, LuthierError
from luthier_kernels.optimizers import AdamW8bit as Stepper

from luthier_optimizers import AdamW8bit


class EightBitAdamW:
    """AdamW whose moments are 8-bit codes; those of weights below 4,096 elements are float32."""

    separable = True

    def __init__(self, options: AdamW8bit) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Return the optimizer; raises `part-unsupported` for sharded weights, whose blocks would be cut."""
        if any(hasattr(p, "full_tensor") for group in groups for p in group.parameters):
            remedy = "Use optimizer adamw, or train on one device or with DDP."
            problem = "optimizer 'adamw_8bit' knows no sharded weights"
            raise LuthierError("part-unsupported", problem, remedy=remedy)
        o = self.options
        settings = [group.settings(o.weight_decay) for group in groups]
        return Stepper(settings, lr=0.0, betas=o.betas, eps=o.eps)

    def evaluating(self) -> AbstractContextManager[None]:
        """The weights that it steps are those to evaluate and save."""
        return nullcontext()
