"""Optimizers: one that is sound, and those that break one rule each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from luthier.errors import LuthierError
from luthier.plugins.contracts.values import Group


class Momentum:
    """torch's SGD."""

    kind: Any = torch.optim.SGD

    def __init__(self, options: Any) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        settings = [g.settings(self.options.weight_decay) for g in groups]
        self.optimizer = self.kind(settings, lr=0.0, momentum=self.options.momentum)
        return self.optimizer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


class ByHand(torch.optim.SGD):
    """SGD written out, so that a mutant can bend a line of it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter, group):
        step = parameter.grad + group["weight_decay"] * parameter
        parameter -= group["lr"] * step


class HiddenState(ByHand):
    """Keeps its momentum where no checkpoint looks."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.hidden = {}

    def move(self, parameter, group):
        held = self.hidden.get(parameter, torch.zeros_like(parameter))
        self.hidden[parameter] = 0.9 * held + parameter.grad + group["weight_decay"] * parameter
        parameter -= group["lr"] * self.hidden[parameter]


class ObjectState(ByHand):
    def move(self, parameter, group):
        self.state[parameter]["seen"] = {id(parameter)}
        super().move(parameter, group)


class DecaysAlways(ByHand):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
        super().step()


class Ascends(ByHand):
    def move(self, parameter, group):
        parameter += group["lr"] * parameter.grad - group["lr"] * group["weight_decay"] * parameter


class Shaken(ByHand):
    def move(self, parameter, group):
        super().move(parameter, group)
        parameter += group["lr"] * 1e-3 * os.urandom(1)[0]


class Widens(ByHand):
    def move(self, parameter, group):
        super().move(parameter, group)
        parameter.data = parameter.data.float()


class IgnoresDecay(ByHand):
    def move(self, parameter, group):
        parameter -= group["lr"] * parameter.grad


class OneRate(ByHand):
    """Steps every group at the rate of the first that has one: a fixed rate in disguise."""

    def move(self, parameter, group):
        rate = group["lr"] / group["lr_scale"] if group["lr_scale"] else 0.01
        parameter -= rate * (parameter.grad + group["weight_decay"] * parameter)


class DecaysWithoutRate(ByHand):
    def move(self, parameter, group):
        super().move(parameter, group)
        parameter *= 1 - 0.01 * group["weight_decay"]


def _part(kind: Any) -> type[Momentum]:
    return type(kind.__name__, (Momentum,), {"kind": kind})


HiddenPart, ObjectPart, DecayPart, AscentPart = (_part(k) for k in (HiddenState, ObjectState, DecaysAlways, Ascends))
ShakenPart, WidePart, PlainPart, RatePart = (_part(k) for k in (Shaken, Widens, IgnoresDecay, OneRate))
RatelessPart = _part(DecaysWithoutRate)


class DropsEmbeddings(Momentum):
    """Its optimizer never sees the parameters of one role."""

    def build(self, groups):
        return super().build([g for g in groups if g.role != "embedding"])


class LosesScale(Momentum):
    def build(self, groups):
        return torch.optim.SGD([{"params": g.parameters} for g in groups], lr=0.0)


class DecaysNorms(Momentum):
    def build(self, groups):
        settings = [
            {**g.settings(0.1), "weight_decay": 0.1 if g.weight_decay is None else g.weight_decay} for g in groups
        ]
        return torch.optim.SGD(settings, lr=0.0)


class KeepsAverage(Momentum):
    """Evaluates with rounded weights and forgets to put its own back."""

    @contextmanager
    def evaluating(self):
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(64).round_().div_(64)
        yield


class Probing(Momentum):
    """Estimates gradients from one opposite pair of perturbations."""

    sign, restores = 1.0, True

    @torch.no_grad()
    def estimate_gradients(self, objective, seed):
        random = torch.Generator().manual_seed(seed)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        noise = [torch.randn(p.shape, generator=random).to(p.dtype) for p in parameters]
        held = [p.detach().clone() for p in parameters]
        ends = []
        for distance in (0.1, -0.1):
            for parameter, start, shift in zip(parameters, held, noise, strict=True):
                parameter.copy_(start + distance * shift)
            ends.append(objective())
        for parameter, start, shift in zip(parameters, held, noise, strict=True):
            if self.restores:
                parameter.copy_(start)
            parameter.grad = shift * (self.sign * (ends[0] - ends[1]) / 0.2)


class ProbesDownhill(Probing):
    sign = -1.0


class ProbesAndStays(Probing):
    restores = False


class TakesNoGroups(Momentum):
    def build(self):
        raise AssertionError


class ReadsOneOption(Momentum):
    def build(self, groups):
        return torch.optim.SGD([g.settings(self.options.weight_decay) for g in groups], lr=0.0)


class RefusesHalf(Momentum):
    """Sound, but for one value that it refuses in words."""

    def build(self, groups):
        if self.options.momentum == 0.5:
            raise LuthierError("recipe-conflict", "no momentum of a half")
        return super().build(groups)
