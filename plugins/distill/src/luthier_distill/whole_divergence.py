"""Divergences [C] over the whole vocabulary, whose gradient is made with the value, in few tensors of [C, V].

With s and t the log-probabilities of model and teacher, p their exponentials and D the divergence of a row, the
gradients by the model's logits are p_s - p_t (forward), p_s (s - t - D) (reverse), and (1 - beta) p_s (s - m - D_s) for
the mixture m, where D_s is KL(model || m): what m itself contributes cancels out.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Found(NamedTuple):
    """Values [C], and the gradients [C, V] by the model's logits over the temperature, if they were asked for."""

    values: Tensor
    gradient: Tensor | None


class Formula(Protocol):
    def __call__(self, student: Tensor, teacher: Tensor, beta: float, differentiate: bool) -> Found: ...


class WholeDivergence(torch.autograd.Function):
    """temperature^2 times a divergence of two models' logits [C, V]; the teacher's get no gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, theirs: Tensor, kind: str, temperature: float, beta: float) -> Tensor:
        student, teacher = (scaled_logprobs(logits, temperature) for logits in (own, theirs))
        found = FORMULAS[kind](student, teacher, beta, ctx.needs_input_grad[0])
        ctx.kind, ctx.temperature = own.dtype, temperature
        if found.gradient is not None:
            ctx.save_for_backward(found.gradient)
        return temperature**2 * found.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * (ctx.temperature * factors)[:, None]).to(ctx.kind), None, None, None, None


def scaled_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """Return new memory [C, V] in float32 or better, the log-probabilities at a temperature."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)


def forward_kl(student: Tensor, teacher: Tensor, beta: float, differentiate: bool) -> Found:
    """Use up the memory of both."""
    chances = teacher.exp()
    values = teacher.sub_(student).mul_(chances).sum(-1)
    return Found(values, student.exp_().sub_(chances) if differentiate else None)


def reverse_kl(student: Tensor, teacher: Tensor, beta: float, differentiate: bool) -> Found:
    """Use up the memory of both."""
    return _divergence_from(student, teacher, differentiate)


def mixed_divergence(student: Tensor, teacher: Tensor, beta: float, differentiate: bool) -> Found:
    """Use up the memory of both."""
    mixture = student + math.log1p(-beta)
    torch.logaddexp(mixture, teacher + math.log(beta), out=mixture)
    chances = teacher.exp()
    values = beta * teacher.sub_(mixture).mul_(chances).sum(-1)
    del chances
    found = _divergence_from(student, mixture, differentiate)
    gradient = None if found.gradient is None else found.gradient.mul_(1 - beta)
    return Found(values + (1 - beta) * found.values, gradient)


def _divergence_from(student: Tensor, other: Tensor, differentiate: bool) -> Found:
    """Return KL(student || other) in the memory of both."""
    gaps = torch.sub(student, other, out=other)
    chances = student.exp_()
    values = (chances * gaps).sum(-1)
    return Found(values, gaps.sub_(values[:, None]).mul_(chances) if differentiate else None)


FORMULAS: Final[dict[str, Formula]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": mixed_divergence,
}
