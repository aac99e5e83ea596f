"""The optimizer parts. Each builds the optimizer of a run for the adapter's groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from luthier import Group, LuthierError
from luthier_kernels.optimizers import AdamW8bit as EightBitStepper

from luthier_optimizers.apollo import ApolloStepper
from luthier_optimizers.averages import AdEMAMixStepper, Averaged, ScheduleFreeStepper
from luthier_optimizers.muon import MuonStepper
from luthier_optimizers.options import Adafactor, AdamW8bit, AdEMAMix, Apollo, Muon, PagedAdamW, ScheduleFree
from luthier_optimizers.paged import PagedStepper

MATRICES: Final = ("hidden", "adapter")  # roles whose matrices are used in products, unlike embedding tables


class Part:
    """The base of the parts, which evaluate and save the weights that they step."""

    separable = True
    name = ""

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def settings(self, groups: Sequence[Group], weight_decay: float) -> list[dict[str, Any]]:
        """Return the groups as torch takes them. Raises `part-unsupported` for sharded weights."""
        if any(hasattr(p, "full_tensor") for group in groups for p in group.parameters):
            remedy = "Use optimizer adamw, or train on one device or with DDP."
            problem = f"optimizer '{self.name}' cannot step sharded weights"
            raise LuthierError("part-unsupported", problem, remedy=remedy)
        return [group.settings(weight_decay) for group in groups]


class EightBitAdamW(Part):
    """AdamW with 8-bit moments. Moments of weights below 4,096 elements are float32."""

    name = "adamw_8bit"

    def __init__(self, options: AdamW8bit) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        return EightBitStepper(self.settings(groups, o.weight_decay), lr=0.0, betas=o.betas, eps=o.eps)


class MuonPart(Part):
    """Muon for the matrices of layers and adapters, AdamW for embeddings, head, norms and biases."""

    name = "muon"

    def __init__(self, options: Muon) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o, settings = self.options, self.settings(groups, self.options.weight_decay)
        for group, setting in zip(groups, settings, strict=True):
            setting["orthogonal"] = group.role in MATRICES
        return MuonStepper(
            settings, momentum=o.momentum, nesterov=o.nesterov, ns_steps=o.ns_steps, adjust_lr=o.adjust_lr,
            betas=o.betas, eps=o.eps,
        )  # fmt: skip


class AdafactorPart(Part):
    """Torch's Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): steps scale with the weight, without momentum."""

    name = "adafactor"

    def __init__(self, options: Adafactor) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        settings = self.settings(groups, o.weight_decay)
        return torch.optim.Adafactor(settings, lr=0.0, beta2_decay=o.beta2_decay, eps=(None, o.eps), d=o.clip)


class ScheduleFreePart(Part):
    """Schedule-free AdamW. Evaluation and files use the average."""

    name = "schedule_free"

    def __init__(self, options: ScheduleFree) -> None:
        self.options = options
        self.stepper: ScheduleFreeStepper | None = None

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        self.stepper = ScheduleFreeStepper(
            self.settings(groups, o.weight_decay), momentum=o.momentum, beta2=o.beta2, eps=o.eps, r=o.r,
            weight_lr_power=o.weight_lr_power,
        )  # fmt: skip
        return self.stepper

    def evaluating(self) -> AbstractContextManager[None]:
        return Averaged(self.stepper)


class AdEMAMixPart(Part):
    """AdEMAMix."""

    name = "ademamix"

    def __init__(self, options: AdEMAMix) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        settings = self.settings(groups, o.weight_decay)
        return AdEMAMixStepper(settings, betas=o.betas, alpha=o.alpha, warmup_steps=o.warmup_steps, eps=o.eps)


class ApolloPart(Part):
    """APOLLO for the matrices of layers and adapters, AdamW for the rest."""

    name = "apollo"

    def __init__(self, options: Apollo) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o, settings = self.options, self.settings(groups, self.options.weight_decay)
        for group, setting in zip(groups, settings, strict=True):
            setting["projected"] = group.role in MATRICES
        return ApolloStepper(
            settings, rank=o.rank, scale_by=o.scale_by, scale=o.scale, refresh_steps=o.refresh_steps,
            max_growth=o.max_growth, betas=o.betas, eps=o.eps, seed=o.seed,
        )  # fmt: skip


class PagedAdamWPart(Part):
    """AdamW with paged moments."""

    name = "paged_adamw"

    def __init__(self, options: PagedAdamW) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        return PagedStepper(self.settings(groups, o.weight_decay), o.folder, o.chunk, betas=o.betas, eps=o.eps)
