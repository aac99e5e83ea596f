"""The optimizer parts `qat_sgd` and `qat_adam`: torch's SGD and Adam for latent weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from luthier import Group, LuthierError

from luthier_bitnet.options import QatAdam, QatSgd


class LatentOptimizer:
    """Adam or SGD with a rate of its own for the matrices of layers, and gradients clipped tensor by tensor.

    A code changes only when its latent weight crosses a threshold, so that the matrices want a higher rate than norms,
    biases, embeddings and head. With `latent_lr` 1 and no clipping it is torch's optimizer.
    """

    separable = True

    def __init__(self, options: QatAdam | QatSgd) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Return the optimizer. `part-unsupported` for sharded weights where each tensor's norm is asked for."""
        o, settings = self.options, [self._settings(group) for group in groups]
        made: torch.optim.Optimizer
        if isinstance(o, QatAdam):
            made = torch.optim.Adam(settings, lr=0.0, betas=o.betas, eps=o.eps)
        else:
            made = torch.optim.SGD(settings, lr=0.0, momentum=o.momentum, nesterov=o.nesterov)
        if o.max_tensor_norm is not None:
            _refuse_shards([p for group in groups for p in group.parameters])
            made.register_step_pre_hook(_Clip(o.max_tensor_norm))
        return made

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _settings(self, group: Group) -> dict[str, Any]:
        settings = group.settings(self.options.weight_decay)
        factor = self.options.latent_lr if group.role == "hidden" else 1.0
        return {**settings, "lr_scale": settings["lr_scale"] * factor}


class _Clip:
    """Called before each step: scales every gradient whose norm is above the limit down to it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient, norm in zip(gradients, torch._foreach_norm(gradients), strict=True):
            gradient.mul_((self.limit / norm.clamp_min(self.limit)).to(gradient.dtype))


def _refuse_shards(parameters: Sequence[torch.nn.Parameter]) -> None:
    if any(hasattr(p, "full_tensor") for p in parameters):
        problem, remedy = "the norm of a sharded tensor is not known", "Leave it out, or train with DDP."
        raise LuthierError("part-unsupported", problem, where="optimizer.max_tensor_norm", remedy=remedy)
