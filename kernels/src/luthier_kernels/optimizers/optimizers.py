"""AdamW as torch optimizers: moments in 8 bits or float32, stochastic rounding of bfloat16 parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from luthier_kernels.optimizers.arithmetic import BLOCK, Rates
from luthier_kernels.optimizers.steps import step_eight_bits, step_floats

SMALL = 4096  # elements below which moments stay in float32, as in bitsandbytes


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), in one pass over memory for each parameter.

    `stochastic_rounding` rounds bfloat16 parameters up or down at random, so that small steps are right on average. The
    random numbers follow from `seed`, the step and the index, so that a resumed run draws the same.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, and return what the closure returned, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, (group, p) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if p.grad is not None:
                self._step_one(p, group, number)
        return loss

    def _step_one(self, p: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update(self._empty(p))
        state["step"] += 1
        done = int(state["step"])
        rates = Rates.at_step(done, float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        key = (self.seed * 1_000_003 + done * 8191 + number) % 2**31 if self.stochastic_rounding else None
        self._advance(p, p.grad.contiguous(), state, rates, key)  # type: ignore[union-attr]

    def _empty(self, p: Tensor) -> dict[str, Tensor]:
        """Return moments of zero for a parameter."""
        return {
            name: torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            for name in ("exp_avg", "exp_avg_sq")
        }

    def _advance(self, p: Tensor, g: Tensor, state: dict[str, Tensor], rates: Rates, key: int | None) -> None:
        step_floats(p, g, (state["exp_avg"], state["exp_avg_sq"]), rates, key)


class AdamW8bit(AdamW):
    """AdamW with moments in 8 bits, 2.03 bytes a parameter (Dettmers et al. 2021, arXiv 2110.02861).

    A first moment is sign(c) (c / 127)^4 and a second one (c / 255)^8, times the largest of its block of 256. Moments
    of parameters below 4,096 elements stay in float32.
    """

    def _empty(self, p: Tensor) -> dict[str, Tensor]:
        if p.numel() < SMALL:
            return super()._empty(p)
        blocks, device = -(-p.numel() // BLOCK), p.device
        return {
            "first_codes": torch.zeros(p.numel(), dtype=torch.int8, device=device),
            "second_codes": torch.zeros(p.numel(), dtype=torch.uint8, device=device),
            "first_scales": torch.zeros(blocks, device=device),
            "second_scales": torch.zeros(blocks, device=device),
        }

    def _advance(self, p: Tensor, g: Tensor, state: dict[str, Tensor], rates: Rates, key: int | None) -> None:
        if "exp_avg" in state:
            super()._advance(p, g, state, rates, key)
            return
        codes = state["first_codes"], state["second_codes"]
        step_eight_bits(p, g, codes, (state["first_scales"], state["second_scales"]), rates, key)
