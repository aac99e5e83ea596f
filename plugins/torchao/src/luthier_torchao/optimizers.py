"""The optimizers of torchao as parts: AdamW whose moments are kept in 8 or 4 bits or in float8."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from luthier import Group, LuthierError
from torch import Tensor

from luthier_torchao import AdamW4bit, AdamW8bit, AdamWFp8
from luthier_torchao.library import STATES, step_adamw

MOMENTS: Final = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have a sign
NARROW_FROM: Final = 4096  # weights of fewer elements keep float32 moments, as in torchao
BLOCKS: Final = {"8bit": 256, "4bit": 128, "fp8": 256}  # neighbours that share a scale: torchao's defaults
SIGNED: Final = ("8bit", "4bit")  # forms with a table of values


class TorchaoOptimizer:
    """torchao's low-bit AdamW."""

    separable = True

    def __init__(self, options: AdamW8bit) -> None:
        self.options = options

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Return the optimizer. Raises `part-unsupported` for sharded weights."""
        o = self.options
        if any(hasattr(p, "full_tensor") for group in groups for p in group.parameters):
            remedy = "Use optimizer adamw, or train on one device or with DDP."
            raise LuthierError("part-unsupported", "these optimizers of torchao step no sharded weights", remedy=remedy)
        form = "4bit" if isinstance(o, AdamW4bit) else "fp8" if isinstance(o, AdamWFp8) else "8bit"
        return LowBitStepper([group.settings(o.weight_decay) for group in groups], form, betas=o.betas, eps=o.eps)

    def evaluating(self) -> AbstractContextManager[None]:
        return nullcontext()


class LowBitStepper(torch.optim.Optimizer):
    """torchao's rule on moments that are kept as the plain tensors of its state classes, as checkpoints need them.

    The rule is run eagerly: torchao's own optimizers compile it, which needs a C++ compiler on a processor.
    """

    def __init__(self, groups: list[dict[str, Any]], form: str, **defaults: Any) -> None:
        self.form = form
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every weight that has a gradient, and return what the closure returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, weight.grad, group)
        return loss

    def _step_one(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            for name, signed in MOMENTS.items():
                state.update(self._empty(weight, name, signed))
        state["step"] += 1
        first, second = (self._moment(weight, state, name, signed) for name, signed in MOMENTS.items())
        count = torch.tensor(float(state["step"]), device=weight.device)
        step_adamw(
            weight.detach(), gradient, count, first, second, None, group["lr"], *group["betas"],
            group["weight_decay"], group["eps"], True, False,
        )  # fmt: skip

    def _empty(self, weight: Tensor, name: str, signed: bool) -> dict[str, Tensor]:
        """Return the tensors of a moment of zeros."""
        if weight.numel() < NARROW_FROM or weight.numel() % BLOCKS[self.form]:
            return {name: torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)}
        arguments = {"signed": signed} if self.form in SIGNED else {}
        made = STATES[self.form].zeros(weight.shape, **arguments, block_size=BLOCKS[self.form], device=weight.device)
        return {f"{name}_codes": made.codes, f"{name}_scale": made.scale}

    def _moment(self, weight: Tensor, state: dict[str, Any], name: str, signed: bool) -> Tensor:
        """Return a moment as torchao takes it, over the tensors that are kept."""
        if name in state:
            return state[name]
        codes, scale, kind = state[f"{name}_codes"], state[f"{name}_scale"], STATES[self.form]
        if self.form == "fp8":
            return kind(codes, scale, torch.float32)
        table = kind.zeros((BLOCKS[self.form],), signed=signed, device=weight.device).qmap
        shape = (weight.shape,) if self.form == "4bit" else ()
        return kind(codes, scale, table, signed, *shape, torch.float32)
