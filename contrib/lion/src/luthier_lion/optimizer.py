"""Lion (Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from luthier import Group, LuthierError
from torch import Tensor

from luthier_lion import Lion


class LionPart:
    """The part `lion`, which builds the optimizer of a run."""

    def __init__(self, options: Lion) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> LionOptimizer:
        """Return Lion over the groups. The core sets the `lr` of each group before every step."""
        settings = [group.settings(self.options.weight_decay) for group in groups]
        return LionOptimizer(settings, betas=self.options.betas)

    def evaluating(self) -> AbstractContextManager[None]:
        """Change nothing: Lion evaluates and saves the weights that it steps."""
        return nullcontext()


class LionOptimizer(torch.optim.Optimizer):
    """Lion: w -= lr * sign(beta1 * m + (1 - beta1) * g), and then m = beta2 * m + (1 - beta2) * g.

    The only state is `momentum`, m, in the weight's dtype and shape. Weight decay is decoupled: w -= lr * decay * w.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every weight that has a gradient. Return what `closure` returned, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _alike(group["params"]):
                _move(weights, [self._momentum(w) for w in weights], group)
        return loss

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["momentum"]


def _alike(weights: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Yield the weights that have a gradient, in lists of one device and dtype, as foreach kernels need them."""
    lists: dict[Any, list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.grad is None:
            continue
        if weight.grad.is_sparse:
            remedy = "Use an embedding with sparse=False."
            raise LuthierError("part-unsupported", "optimizer 'lion' takes no sparse gradient", remedy=remedy)
        lists[weight.device, weight.dtype].append(weight)
    return lists.values()


def _move(weights: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    gradients = [weight.grad for weight in weights if weight.grad is not None]  # each of them has one
    if group["weight_decay"] != 0:
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    steps = torch._foreach_lerp(momenta, gradients, 1 - beta1)
    torch._foreach_sign_(steps)
    torch._foreach_add_(weights, steps, alpha=-lr)
    torch._foreach_lerp_(momenta, gradients, 1 - beta2)
