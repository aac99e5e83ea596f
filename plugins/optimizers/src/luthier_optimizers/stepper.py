"""The base of these optimizers: the loop over weights, float32 arithmetic, AdamW's rule, the size of the state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


class Stepper(torch.optim.Optimizer):
    """An optimizer that steps weight by weight. Narrow weights are stepped in float32 and rounded once."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every weight that has a gradient, and return what the closure returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, (group, weight) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if weight.grad is not None:
                self._step_one(weight, group, number)
        return loss

    def _step_one(self, weight: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[weight]
        wide, gradient = widen(weight), widen(weight.grad)  # type: ignore[arg-type]
        if not state:
            state["step"] = 0
            state.update(self.empty(wide, group))
        state["step"] += 1
        self.advance(wide, gradient, state, {**group, "number": number})
        if wide is not weight:
            weight.copy_(wide)

    @abstractmethod
    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        """Return the state of a weight that has not been stepped."""

    @abstractmethod
    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        """Step a weight in place. `group` has its settings and the number of the weight."""


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or unchanged if it is as wide."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def empty_moments(weight: Tensor) -> State:
    """Return AdamW's two moments, filled with zeros."""
    return {name: torch.zeros_like(weight, memory_format=torch.contiguous_format) for name in ("exp_avg", "exp_avg_sq")}


def adam_direction(gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Update both moments and return the direction of Adam's step (Kingma and Ba 2014, arXiv 1412.6980)."""
    beta1, beta2 = group["betas"]
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
    return (state["exp_avg"] / (1 - beta1 ** state["step"])).div_(root)


def step_adamw(weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
    """Step a weight by AdamW's rule (Loshchilov and Hutter 2017, arXiv 1711.05101)."""
    decay(weight, group)
    weight.add_(adam_direction(gradient, state, group), alpha=-group["lr"])


def decay(weight: Tensor, group: dict[str, Any]) -> None:
    """Apply weight decay, decoupled from the gradient."""
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of state for each weight that has been stepped."""
    weights = sum(weight.numel() for weight in optimizer.state)
    num_bytes = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
    )
    return num_bytes / weights if weights else 0.0
