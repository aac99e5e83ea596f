"""The options of `ternary` and `bitnet`, and the schedule by which weights become ternary."""

from __future__ import annotations

import math
from typing import Literal

import attrs
from luthier import LuthierError, Progress, option

EXPONENT = 5.0  # an exponential schedule is at (e^(5t) - 1) / (e^5 - 1) after the share t of its time


@attrs.frozen(kw_only=True)
class Schedule:
    """When layers change from latent to ternary weights. Without any bound they are ternary from the start."""

    start_epoch: float | None = option(None, help="Epoch until which weights are not rounded.", low=0)
    end_epoch: float | None = option(None, help="Epoch from which weights are ternary.", low=0)
    start_step: int | None = option(None, help="Optimizer step until which weights are not rounded.", low=0)
    end_step: int | None = option(None, help="Optimizer step from which weights are ternary.", low=0)
    schedule_type: Literal["linear", "cosine", "exponential"] = option(
        "linear", help="How the share of rounding grows from start to end."
    )

    def __attrs_post_init__(self) -> None:
        epochs, steps = (self.start_epoch, self.end_epoch), (self.start_step, self.end_step)
        if any(v is not None for v in epochs) and any(v is not None for v in steps):
            problem = "a schedule must be in epochs or in steps, not in both"
            raise LuthierError("recipe-conflict", problem, where="end_step", remedy="Leave one pair of them out.")
        start, end = self.bounds()
        if end < start:
            problem = f"the schedule's end, {end:g}, is before its start, {start:g}"
            place = "end_epoch" if self.start_step is None and self.end_step is None else "end_step"
            raise LuthierError("recipe-conflict", problem, where=place, remedy="Set an end that is not earlier.")

    def bounds(self) -> tuple[float, float]:
        """Return start and end in epochs or steps. An end that is not given equals the start."""
        start = self.start_epoch if self.start_step is None else self.start_step
        end = self.end_epoch if self.end_step is None else self.end_step
        return float(start or 0), float(start or 0) if end is None else float(end)

    def share(self, progress: Progress) -> float:
        """Return the share of rounding, 0 to 1, at a position of the run."""
        in_steps = self.start_step is not None or self.end_step is not None
        now = float(progress.step if in_steps else progress.epoch)
        start, end = self.bounds()
        if now < start:
            return 0.0
        if now >= end:
            return 1.0
        way = (now - start) / (end - start)
        if self.schedule_type == "cosine":
            return (1 - math.cos(math.pi * way)) / 2
        return math.expm1(EXPONENT * way) / math.expm1(EXPONENT) if self.schedule_type == "exponential" else way


@attrs.frozen(kw_only=True)
class RangeTuning:
    """What layers try on the validation rows, in turn. Without factors nothing is tried."""

    factors: list[float] = option(
        factory=list, help="Factors by which a layer's range or threshold is tried, such as [0.9, 1.1].", low=0.25,
        high=4.0,
    )  # fmt: skip
    layers: int = option(1, help="Layers that have their turn at each evaluation.", low=1)
    min_gain: float = option(
        0.0, help="Share by which eval_loss must fall for another factor to be kept.", low=0.0, high=0.9
    )

    @property
    def fewer_bits(self) -> list[float]:
        """Return the numbers of bits that are tried, from the most to the fewest."""
        return []

    @property
    def allowed_rise(self) -> float:
        """Return the share by which the loss may rise for fewer bits."""
        return 0.0

    @property
    def tries(self) -> bool:
        """Return True if there is something to try."""
        return bool(self.factors or self.fewer_bits)


@attrs.frozen(kw_only=True)
class Ternary:
    """Options of the quantizer `ternary`."""

    method: Literal["absmean", "twn"] = option(
        "twn",
        help="How threshold and level are chosen: `twn` keeps weights with |w| > 0.75 mean |w|, at their mean, close "
        "to the "
        "least squared error; `absmean` rounds w / mean |w|, as BitNet b1.58 does.",
    )
    granularity: Literal["tensor", "row", "group"] = option(
        "tensor", help="Weights that share a scale. Packed BitNet files have one for each tensor."
    )
    group_size: int = option(
        256, help="With granularity group: number of neighbours in a row that share a scale.", low=1
    )
    estimator: Literal["straight_through", "clipped"] = option(
        "straight_through",
        help="The gradient of a latent weight: `straight_through` ignores the rounding; `clipped` does so too, but is "
        "0 beyond "
        "1.5 scales, where rounding cannot change.",
    )
    schedule: Schedule = option(factory=Schedule, help="When layers become ternary.")
    second_stage_start: float | None = option(
        None,
        help="Share of the run's steps after which the rate falls and weight decay ends; none: no second stage.",
        low=0,
        high=1,
    )
    second_stage_lr: float = option(0.667, help="Factor of the learning rate in the second stage.", low=0)
    sub_norms: list[str] = option(
        factory=list,
        help="Layers that get an RMSNorm of their own before them (SubLN), by the last part of their name: [o_proj, "
        "down_proj]. It begins at the size that each layer's inputs have, and comes in with the schedule.",
    )
    skip_modules: list[str] = option(
        factory=list,
        help="Modules that stay exact, besides the output head and routers, with all their parts: names, or whole "
        "parts of names.",
    )
    tuning: RangeTuning = option(
        factory=RangeTuning, help="Thresholds that layers try at each evaluation; what is worse is taken back."
    )


@attrs.frozen(kw_only=True)
class Bitnet(Ternary):
    """Options of the quantizer `bitnet`."""

    method: Literal["absmean", "twn"] = option(
        "absmean",
        help="How threshold and level are chosen: `absmean` rounds w / mean |w|, as BitNet b1.58 does; `twn` has less "
        "error.",
    )


@attrs.frozen(kw_only=True)
class Packed:
    """Options of the exporter `bitnet_packed`."""

    weight_scale: Literal["divide", "multiply"] = option(
        "divide",
        help="What the reader does with the scale of a layer: `divide` is transformers' BitLinear, `multiply` its "
        "AutoBitLinear, "
        "which BitNet 2B4T uses.",
    )


@attrs.frozen(kw_only=True)
class Latent:
    """What the optimizers for latent weights have in common."""

    latent_lr: float = option(
        1.0,
        help="Factor of the learning rate of the layers' matrices: a code changes only when its latent weight crosses "
        "a threshold.",
        low=0.1,
    )
    max_tensor_norm: float | None = option(
        None, help="Clip the gradient of each tensor alone to this norm, besides max_grad_norm; none: do not.", low=1e-3
    )
    weight_decay: float = option(0.0, help="Weight decay, added to the gradient as torch's optimizer has it.", low=0.0)


@attrs.frozen(kw_only=True)
class QatAdam(Latent):
    """Options of the optimizer `qat_adam`."""

    betas: tuple[float, float] = option((0.9, 0.999), help="Decay of the two moments.", low=0.0, high=0.9999)
    eps: float = option(1e-8, help="Added to the denominator.", low=0.0)


@attrs.frozen(kw_only=True)
class QatSgd(Latent):
    """Options of the optimizer `qat_sgd`."""

    momentum: float = option(0.9, help="Decay of the sum of gradients.", low=0.0, high=0.9999)
    nesterov: bool = option(False, help="Look ahead along the momentum.")

    def __attrs_post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            remedy = "Set momentum, or leave nesterov out."
            raise LuthierError("recipe-conflict", "nesterov looks along a momentum", where="nesterov", remedy=remedy)
