"""AdamW and SGD, torch's own, over the groups that the adapter gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from luthier.builtin import AdamW, Sgd
from luthier.plugins.contracts.values import Group


class FusedAdamW:
    """Loshchilov & Hutter, arXiv 1711.05101; one fused kernel per group where the device has it."""

    separable = True

    def __init__(self, options: AdamW) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        settings = [g.settings(o.weight_decay) for g in groups]
        return torch.optim.AdamW(settings, lr=0.0, betas=o.betas, eps=o.eps, amsgrad=o.amsgrad, fused=_fusible(groups))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


class MomentumSgd:
    separable = True

    def __init__(self, options: Sgd) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        settings = [g.settings(o.weight_decay) for g in groups]
        # torch's fused SGD, unlike its AdamW, does not support shards
        fused = _fusible(groups) and not _sharded(groups)
        return torch.optim.SGD(settings, lr=0.0, momentum=o.momentum, nesterov=o.nesterov, fused=fused)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


def _sharded(groups: list[Group]) -> bool:
    return any(hasattr(p, "full_tensor") for g in groups for p in g.parameters)


def _fusible(groups: list[Group]) -> bool:
    """Return True if torch has a fused kernel there; elsewhere it chooses its multi-tensor form where it can."""
    devices = {p.device.type for g in groups for p in g.parameters}
    return devices <= {"cpu", "cuda", "mps"}
