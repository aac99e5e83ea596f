"""The options of the quantizers `qat` and `qat_activations`."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LuthierError, option

from luthier_bitnet.options import Schedule

BITS = (1, 1.58, 2, 4, 8)
Observer = Literal["minmax", "percentile", "mse", "kl"]
OBSERVER = (
    "What levels are laid over: `minmax` all values, `percentile` all but the outermost, `mse` the range of least "
    "squared error, `kl` that whose distribution is nearest."
)


@attrs.frozen(kw_only=True)
class Qat:
    """Options of the quantizer `qat`."""

    bits: float = option(4, help="Bits of a weight: 1 is its sign, 1.58 is -s, 0 and s.", choices=BITS)
    bits_stages: list[float] = option(
        factory=list,
        help="Bits of equal stages of the run before the last one, which has `bits`: [8, 4].",
        choices=BITS,
    )
    symmetric: bool = option(True, help="Levels on both sides of 0 alike; without it they follow least and largest.")
    granularity: Literal["tensor", "row", "group"] = option("row", help="Weights that share a scale.")
    group_size: int = option(128, help="With granularity group: neighbours of a row that share a scale.", low=1)
    observer: Observer = option("mse", help=OBSERVER)
    percentile: float = option(99.9, help="With observer percentile: the share of values inside.", low=50, high=100)
    learn_scale: bool = option(False, help="Train the scales too, by the gradient of LSQ.")
    estimator: Literal["straight_through", "clipped", "soft"] = option(
        "clipped",
        help="The gradient of a latent weight: as if it were not rounded; none beyond the outermost levels; or that of "
        "a smooth staircase, within them.",
    )
    temperature: float = option(
        4.0, help="With estimator soft: how steep the staircase is; near 0 as `clipped`, large as rounding.", low=1e-3
    )
    noise_factor: float = option(
        0.0, help="Standard deviation of noise on weights in training, in steps between levels.", low=0
    )
    schedule: Schedule = option(factory=Schedule, help="When layers become quantized.")
    skip_modules: list[str] = option(
        factory=list,
        help="Modules left exact beside the output head and routers, with all in them: names, or whole parts of names.",
    )

    def __attrs_post_init__(self) -> None:
        problems = [
            (self.learn_scale and not self.symmetric, "a learned scale is that of symmetric levels", "symmetric"),
            (self.learn_scale and bool(self.bits_stages), "a learned scale is of one number of bits", "bits_stages"),
            (not self.symmetric and min(self.bits, *self.bits_stages, 8) < 2,
             "levels of fewer than 2 bits lie on both sides of 0 alike", "symmetric"),
        ]  # fmt: skip
        for wrong, problem, where in problems:
            if wrong:
                raise LuthierError("recipe-conflict", problem, where=where, remedy="Leave one of the two out.")


@attrs.frozen(kw_only=True)
class QatActivations(Qat):
    """Options of the quantizer `qat_activations`."""

    activation_bits: int = option(8, help="Bits of an activation.", choices=(2, 4, 8))
    activation_symmetric: bool = option(False, help="Levels of activations on both sides of 0 alike.")
    activation_granularity: Literal["token", "tensor"] = option("token", help="Activations that share a scale.")
    activation_observer: Observer = option("minmax", help=OBSERVER)
    online_calibration: bool = option(
        False, help="Keep one range for each layer, measured again while it trains; without it each batch has its own."
    )
    calibration_frequency: int = option(1000, help="Steps between two measurements.", low=1)
    calibration_samples: int = option(512, help="Tokens of one measurement; a micro-batch has at least as many.", low=1)
    calibration_decay: float = option(
        0.5, help="How much of the range before stays at a measurement.", low=0.0, high=0.999
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.online_calibration and self.activation_granularity == "token":
            problem = "a range that is kept is one for all tokens"
            raise LuthierError("recipe-conflict", problem, where="activation_granularity", remedy="Set it to tensor.")
