"""Evolution strategies: a gradient estimated from the losses at perturbed weights, by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from luthier import Group
from torch import Tensor, nn

from luthier_optimizers.options import Evolution
from luthier_optimizers.parts import Part
from luthier_optimizers.stepper import State, Stepper, empty_moments, step_adamw, widen


class EvolutionStepper(Stepper):
    """AdamW's rule, in float32."""

    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        return empty_moments(weight)

    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        step_adamw(weight, gradient, state, group)


class EvolutionPart(Part):
    """Evolution strategies (Salimans et al. 2017, arXiv 1703.03864) with opposite pairs and shaped losses.

    The gradient of weights w is estimated as the mean over pairs k of (u_k+ - u_k-) e_k / (2 sigma), where u are the
    shaped losses at w + sigma e_k and w - sigma e_k, and e_k is standard normal. With `rank` r, e of a matrix is
    A B^T / sqrt(r) of two normal factors (EGGROLL: Sarkar et al. 2025, arXiv 2511.16652). Perturbations are drawn from
    the step's seed twice, so that none is kept.
    """

    name = "evolution"

    def __init__(self, options: Evolution) -> None:
        self.options = options
        self.weights: list[nn.Parameter] = []

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        self.weights = [parameter for group in groups for parameter in group.parameters]
        return EvolutionStepper(self.settings(groups, o.weight_decay), betas=o.betas, eps=o.eps)

    @torch.no_grad()
    def estimate_gradients(self, objective: Callable[[], float], seed: int) -> None:
        """Fill the gradients of all weights, in the dtype that each weight's gradient has.

        All are NaN if a loss is not finite.
        """
        scale = 1 / (4 * self.options.sigma**2 * self.options.pairs)
        with restored(self.weights) as start:
            losses = [self._losses(objective, start, seed + pair) for pair in range(self.options.pairs)]
            sums = [torch.zeros_like(weight) for weight in start]
            for pair, (up, down) in enumerate(shape_losses(losses, self.options.shaping)):
                for total, (above, below) in zip(sums, self._moved(start, seed + pair), strict=True):
                    total.add_(widen(above).sub_(widen(below)), alpha=(up - down) * scale)
        for weight, total in zip(self.weights, sums, strict=True):
            weight.grad = total.to(weight.grad_dtype or weight.dtype)

    def _losses(self, objective: Callable[[], float], start: Sequence[Tensor], seed: int) -> tuple[float, float]:
        """Return the losses on both sides of the weights `start`, which are not restored."""
        ends = []
        for side in (0, 1):
            for weight, moved in zip(self.weights, self._moved(start, seed), strict=True):
                weight.copy_(moved[side])
            ends.append(objective())
        return ends[0], ends[1]

    def _moved(self, start: Sequence[Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each weight moved to both sides of `start`, in its own dtype, by a perturbation drawn from the seed.

        The estimate is made of the moves as that dtype rounds them, so that it stays one along what was measured.
        """
        sigma, generators = self.options.sigma, dict[torch.device, torch.Generator]()
        for weight, held in zip(self.weights, start, strict=True):
            if weight.device not in generators:
                generators[weight.device] = torch.Generator(weight.device).manual_seed(seed)
            perturbation = draw_perturbation(weight, generators[weight.device], self.options.rank)
            yield (
                held.add(perturbation, alpha=sigma).to(weight.dtype),
                held.sub(perturbation, alpha=sigma).to(weight.dtype),
            )


@contextmanager
def restored(weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Restore the bits of the weights after this context; yields copies of them, in float32 or wider."""
    held = [widen(weight.detach()).clone() for weight in weights]
    try:
        yield held
    finally:
        for weight, before in zip(weights, held, strict=True):
            weight.copy_(before)


def draw_perturbation(weight: Tensor, generator: torch.Generator, rank: int) -> Tensor:
    """Return the perturbation of a weight, float32 or wider, of its shape, with entries of variance 1.

    A matrix whose shorter side is above `rank` gets one of that rank, if it is not 0.
    """
    wide = widen(weight)
    if not rank or weight.dim() != 2 or rank >= min(weight.shape):
        return torch.randn(weight.shape, generator=generator, dtype=wide.dtype, device=weight.device)
    rows, columns = (
        torch.randn(size, rank, generator=generator, dtype=wide.dtype, device=weight.device) for size in weight.shape
    )
    return rows @ columns.T / math.sqrt(rank)


def shape_losses(losses: Sequence[tuple[float, float]], shaping: str) -> list[tuple[float, float]]:
    """Return the weight of each perturbation, by the losses of all; NaN for all if one is not finite.

    `ranks`: evenly from -1/2 for the lowest to 1/2, equal losses share the mean of their ranks. `z_score`: distance
    from the mean in standard deviations.
    """
    flat = torch.tensor([loss for pair in losses for loss in pair], dtype=torch.float64)
    if not torch.isfinite(flat).all():
        flat = torch.full_like(flat, math.nan)
    elif shaping == "ranks":
        lower, equal = ((compare(flat[:, None], flat)).sum(1).double() for compare in (torch.gt, torch.eq))
        flat = (lower + (equal - 1) / 2) / (len(flat) - 1) - 0.5
    elif shaping == "z_score":
        flat = (flat - flat.mean()) / flat.std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    return [(float(up), float(down)) for up, down in flat.view(-1, 2)]
