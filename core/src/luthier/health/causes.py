"""The likeliest causes why one batch cannot be learnt by heart, judged by what its steps showed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from luthier.data.batches.example_feed import Portion
from luthier.health.watch import Remark

if TYPE_CHECKING:
    from luthier.health.flow import Flow

FEW: Final = 0.02  # share of supervised tokens: a conversation is mostly prompt, but less than this is a wrong mask
STILL: Final = 1e-6  # ratio of update to weight that is next to nothing
NOTHING: Final = 1e-8  # norm of a gradient that is next to nothing
LEAP: Final = 0.5  # share of the first loss: noise alone does not rise so far


def list_causes(rate: float, portion: Portion, losses: Sequence[float], remarks: Sequence[Remark],
           flow: Sequence[Flow], norm: float) -> list[str]:  # fmt: skip
    """Return what to check, the likeliest cause first; never empty. `rate` is the peak learning rate."""
    causes = [
        *_rate(rate),
        *_labels(portion),
        *(_leap(losses, rate) or _gradient(norm)),
        *_movement(flow),
        *(_remark(remark) for remark in remarks),
    ]
    return causes or [_course(losses, rate)]


def _rate(rate: float) -> list[str]:
    return ["the learning rate is 0: set learning_rate"] if rate == 0 else []


def _labels(portion: Portion) -> list[str]:
    """Return what to check if hardly any token is supervised."""
    supervised, tokens = portion.num_supervised, portion.num_tokens
    if supervised > FEW * tokens:
        return []
    remedy = "look at the rows with `luthier inspect`, and at data.train_on, the columns and the chat template"
    return [f"only {supervised} of {tokens} tokens are supervised: {remedy}"]


def _leap(losses: Sequence[float], rate: float) -> list[str]:
    """Return what to check if the loss rose far, perhaps to a point where nothing moves any more."""
    most = max(loss for loss in losses if math.isfinite(loss))
    if most < losses[0] + LEAP * abs(losses[0]):
        return []
    return [
        f"the loss rises, to {most:.3g}: a learning rate of {rate:g} may be too high, or the loss has the wrong sign"
    ]


def _gradient(norm: float) -> list[str]:
    return [f"the gradient is next to nothing, its norm {norm:.2g}: look at the loss"] if norm < NOTHING else []


def _remark(remark: Remark) -> str:
    names = ", ".join(remark.facts["first"])
    more = f" and {remark.facts['parameters'] - len(remark.facts['first'])} more"
    shown = names + (more if remark.facts["parameters"] > len(remark.facts["first"]) else "")
    if remark.kind == "unreached":
        return f"no gradient reaches {shown}: is it used, and is nothing between it and the loss detached?"
    return f"a gradient reaches {shown}, and the optimizer does not move it: look at its learning rate and dtype"


def _movement(flow: Sequence[Flow]) -> list[str]:
    """Return what to check if the steps are too small to change the weights."""
    still = [layer for layer in flow if layer.ratio < STILL]
    most = max((layer.ratio for layer in flow), default=0.0)
    if len(still) < len(flow) or most == 0:  # if no layer moves at all, the rate is not the cause
        return []
    return [f"a step moves no layer's weights by more than {most:.1g} of their norm: raise learning_rate"]


def _course(losses: Sequence[float], rate: float) -> str:
    """Return what the loss curve itself says, if nothing else is wrong."""
    first, last, least = losses[0], losses[-1], min(loss for loss in losses if math.isfinite(loss))
    if last > first:
        return f"the loss rises: a learning rate of {rate:g} may be too high, or the loss has the wrong sign"
    if last > 1.5 * least and least < 0.9 * first:
        return f"the loss falls and rises again: a learning rate of {rate:g} may be too high"
    share = 1 - last / first if first > 0 else 0.0
    if share > 0.05:
        return f"the loss falls, by {share:.0%} in {len(losses)} steps: try more steps, or a higher learning_rate"
    return "the loss hardly moves: raise learning_rate, or train more of the model (a higher rank, more targets)"
