"""Schedule-free AdamW and AdEMAMix: AdamW with an average of the weights, and with a slow average of the gradients."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from luthier_optimizers.stepper import State, Stepper, decay, widen


class ScheduleFreeStepper(Stepper):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682). The weights are at y, where gradients are taken.

    z is the sequence that is stepped, x its weighted average, and y = (1 - beta) z + beta x. z is kept; x is computed.
    """

    averaged = False  # True while the weights are x

    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        second = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        return {"z": weight.clone(), "exp_avg_sq": second, "weight_sum": 0.0, "largest_rate": 0.0}

    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        beta1, beta2 = group["momentum"], group["beta2"]
        rate, step, z = float(group["lr"]), state["step"], state["z"]
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        move = (gradient / root).add_(weight, alpha=group["weight_decay"])
        state["largest_rate"] = max(rate, state["largest_rate"])
        share = step ** group["r"] * state["largest_rate"] ** group["weight_lr_power"] if rate else 0.0
        state["weight_sum"] += share
        new = share / state["weight_sum"] if state["weight_sum"] else 0.0  # share of the new z in the average
        weight.lerp_(z, new).add_(move, alpha=rate * (beta1 * (1 - new) - 1))
        z.sub_(move, alpha=rate)

    def average(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Return x, in the precision in which weights are stepped."""
        return widen(weight.detach()).lerp(self.state[weight]["z"], 1 - 1 / group["momentum"])


class Averaged(AbstractContextManager[None]):
    """A context in which the weights are their averages. After it they have the same bits as before."""

    def __init__(self, optimizer: ScheduleFreeStepper | None) -> None:
        self.optimizer = optimizer
        self.held: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        if self.optimizer is None or self.optimizer.averaged:
            return
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                if "z" in self.optimizer.state.get(weight, {}):
                    self.held.append((weight, weight.detach().clone()))
                    weight.copy_(self.optimizer.average(weight, group))
        self.optimizer.averaged = bool(self.held)

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for weight, stepped in self.held:
            weight.copy_(stepped)
        if self.held and self.optimizer is not None:
            self.held, self.optimizer.averaged = [], False


class AdEMAMixStepper(Stepper):
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): a fast plus a slow average of the gradients."""

    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        names = ("fast", "slow", "exp_avg_sq")
        return {name: torch.zeros_like(weight, memory_format=torch.contiguous_format) for name in names}

    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        beta1, beta2, _ = group["betas"]
        step = state["step"]
        alpha, beta3 = warmed_up(step, group)
        state["fast"].lerp_(gradient, 1 - beta1)
        state["slow"].lerp_(gradient, 1 - beta3)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        move = (state["fast"] / (1 - beta1**step)).add_(state["slow"], alpha=alpha).div_(root)
        decay(weight, group)
        weight.add_(move, alpha=-group["lr"])


def warmed_up(step: int, group: dict[str, Any]) -> tuple[float, float]:
    """Return alpha and the slow decay at a step. Alpha and the half-life of the decay grow linearly."""
    fast, _, slow = group["betas"]
    share = min(step / group["warmup_steps"], 1.0) if group["warmup_steps"] else 1.0
    if share == 1.0 or not 0 < fast < slow:
        return share * float(group["alpha"]), float(slow)
    # 1 / half-life + 1 in steps is about -log(beta): the paper's schedule makes the half-life linear in the step
    half_life = (1 - share) * _half_life(fast) + share * _half_life(slow)
    return share * float(group["alpha"]), float(0.5 ** (1 / (half_life + 1)))


def _half_life(beta: float) -> float:
    return math.log(0.5) / math.log(beta) - 1
