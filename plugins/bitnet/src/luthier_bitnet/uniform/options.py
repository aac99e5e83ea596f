"""The options of the quantizers `qat` and `qat_activations`."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LuthierError, option

from luthier_bitnet.options import RangeTuning, Schedule

BITS = (1, 1.58, 2, 4, 8)
CALIBRATION = ("calibration_frequency", "calibration_samples", "calibration_decay")  # read with online_calibration
Observer = Literal["minmax", "percentile", "mse", "kl"]
OBSERVER = (
    "The range that levels cover: `minmax` all values, `percentile` all but outliers, `mse` the range of least squared "
    "error, `kl` the range whose quantized distribution is nearest."
)


@attrs.frozen(kw_only=True)
class Tuning(RangeTuning):
    """What layers of `qat` try on the validation rows, in turn. Without factors and bits nothing is tried."""

    bits: list[float] = option(factory=list, help="Fewer bits that a layer tries, such as [2].", choices=BITS)
    max_rise: float = option(0.01, help="Share by which eval_loss may rise for fewer bits to be kept.", low=0.0)

    @property
    def fewer_bits(self) -> list[float]:
        return sorted(self.bits, reverse=True)

    @property
    def allowed_rise(self) -> float:
        return self.max_rise


@attrs.frozen(kw_only=True)
class Qat:
    """Options of the quantizer `qat`."""

    bits: float = option(4, help="Bits of a weight: 1 is its sign, 1.58 is -s, 0 and s.", choices=BITS)
    bits_stages: list[float] = option(
        factory=list,
        help="Bits of earlier stages of the run, all of equal length, such as [8, 4]; the last stage has `bits`.",
        choices=BITS,
    )
    symmetric: bool = option(
        True, help="The same levels on both sides of 0; false: levels from the least to the largest value."
    )
    granularity: Literal["tensor", "row", "group"] = option("row", help="Weights that share a scale.")
    group_size: int = option(
        128, help="With granularity group: number of neighbours in a row that share a scale.", low=1
    )
    per_channel: bool | None = option(
        None, help="What other tools call granularity: true is `row`, false is `tensor`; none: granularity says it."
    )
    observer: Observer = option("mse", help=OBSERVER)
    percentile: float = option(
        99.9, help="With observer percentile: the percentage of values inside the range.", low=50, high=100
    )
    learn_scale: bool = option(False, help="Train the scales too, with the gradient of LSQ.")
    estimator: Literal["straight_through", "clipped", "soft"] = option(
        "clipped",
        help="The gradient of a latent weight: `straight_through` ignores the rounding; `clipped` is 0 beyond the "
        "outermost "
        "levels; `soft` is also that of a smooth staircase between them.",
    )
    temperature: float = option(
        4.0,
        help="With estimator soft: steepness of the staircase; near 0 like `clipped`, large like rounding.",
        low=1e-3,
    )
    noise_factor: float = option(
        0.0, help="Standard deviation of noise added to weights in training, in steps between levels.", low=0
    )
    schedule: Schedule = option(factory=Schedule, help="When layers become quantized.")
    tuning: Tuning = option(factory=Tuning, help="What layers try at each evaluation; what is worse is taken back.")
    skip_modules: list[str] = option(
        factory=list,
        help="Modules that stay exact, besides the output head and routers, with all their parts: names, or whole "
        "parts of names.",
    )

    @property
    def sharing(self) -> str:
        """Return the weights that share a scale: tensor, row or group."""
        if self.per_channel is None:
            return self.granularity
        return "row" if self.per_channel else "tensor"

    def __attrs_post_init__(self) -> None:
        named = {True: ("row",), False: ("tensor", "row"), None: ("tensor", "row", "group")}  # row is the default
        problems = [
            (self.granularity not in named[self.per_channel], f"granularity is {self.granularity}", "per_channel"),
            (self.learn_scale and not self.symmetric, "a learned scale needs symmetric levels", "symmetric"),
            (self.learn_scale and bool(self.bits_stages), "a learned scale needs one number of bits", "bits_stages"),
            (self.learn_scale and self.tuning.tries, "a learned scale is not tuned", "tuning"),
            (max(self.tuning.bits, default=0) >= self.bits, "tuning tries fewer bits than a layer has", "tuning.bits"),
            (bool(self.tuning.bits and self.bits_stages), "tuned bits have no stages", "tuning.bits"),
            (not self.symmetric and min(self.bits, *self.bits_stages, *self.tuning.bits, 8) < 2,
             "levels of fewer than 2 bits are always symmetric", "symmetric"),
        ]  # fmt: skip
        for wrong, problem, where in problems:
            if wrong:
                raise LuthierError("recipe-conflict", problem, where=where, remedy="Leave one of the two out.")


@attrs.frozen(kw_only=True)
class QatActivations(Qat):
    """Options of the quantizer `qat_activations`."""

    activation_bits: int = option(8, help="Bits of an activation.", choices=(2, 4, 8))
    activation_symmetric: bool = option(False, help="The same levels of activations on both sides of 0.")
    activation_granularity: Literal["token", "tensor"] = option("token", help="Activations that share a scale.")
    activation_observer: Observer = option("minmax", help=OBSERVER)
    online_calibration: bool = option(
        False, help="Keep one range for each layer and measure it from time to time; false: each batch has its own."
    )
    calibration_frequency: int = option(1000, help="Steps between two measurements.", low=1)
    calibration_samples: int = option(
        512, help="Tokens of one measurement; the largest micro-batch of its step must have at least as many.", low=1
    )
    calibration_decay: float = option(
        0.5, help="Share of the previous range that a measurement keeps.", low=0.0, high=0.999
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.online_calibration and self.activation_granularity == "token":
            problem = "a kept range is shared by all tokens"
            raise LuthierError("recipe-conflict", problem, where="activation_granularity", remedy="Set it to tensor.")
        for name in CALIBRATION if not self.online_calibration else ():
            if getattr(self, name) != attrs.fields_dict(QatActivations)[name].default:
                problem = "nothing reads it: no range is kept and measured from time to time"
                remedy = "Set online_calibration: true, or leave this out."
                raise LuthierError("recipe-conflict", problem, where=name, found=getattr(self, name), remedy=remedy)
