"""The core's own parts, offered like anyone else's: full, sft, adamw, sgd, none, local and four callbacks."""

from __future__ import annotations

from typing import Literal

import attrs

from luthier.errors import LuthierError
from luthier.plugins.hookspecs import hookimpl
from luthier.plugins.options import option
from luthier.plugins.records import (
    AdapterRecord,
    CallbackRecord,
    LossRecord,
    OptimizerRecord,
    ProviderRecord,
    QuantizerRecord,
)


@attrs.frozen(kw_only=True)
class Full:
    """Full fine-tuning has no options."""


@attrs.frozen(kw_only=True)
class Sft:
    """Supervised fine-tuning has no options yet."""


@attrs.frozen(kw_only=True)
class AdamW:
    betas: tuple[float, float] = option((0.9, 0.999), help="Decay of the two running averages.", low=0.0, high=0.999999)
    eps: float = option(1e-8, help="Added to the denominator.", low=0.0)
    weight_decay: float = option(0.01, help="Decoupled decay; norms and biases are spared.", low=0.0)
    amsgrad: bool = option(False, help="Keep the maximum of the second average.")


@attrs.frozen(kw_only=True)
class Sgd:
    momentum: float = option(0.0, help="Share of the last step that is kept.", low=0.0, high=1.0)
    nesterov: bool = option(False, help="Look ahead along the momentum.")
    weight_decay: float = option(0.0, help="L2 decay; norms and biases are spared.", low=0.0)

    def __attrs_post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise LuthierError(
                "recipe-conflict", "nesterov looks ahead along a momentum, which is 0", where="Sgd.nesterov"
            )


@attrs.frozen(kw_only=True)
class NoQuantizer:
    """The base model's weights stay as they are."""


@attrs.frozen(kw_only=True)
class Local:
    """Training in this process has no options."""


@attrs.frozen(kw_only=True)
class Jsonl:
    """metrics.jsonl has no options."""


@attrs.frozen(kw_only=True)
class ProgressBar:
    """The progress bar has no options."""


@attrs.frozen(kw_only=True)
class Plot:
    metrics: list[str] = option(factory=lambda: ["loss", "eval_loss"], help="The metrics drawn in loss.png.")
    smoothing: float = option(0.9, help="Weight of the past in the smoothed line; 0 draws none.", low=0.0, high=0.999)


@attrs.frozen(kw_only=True)
class EarlyStopping:
    metric: str = option("eval_loss", help="The metric of an evaluation that must improve.")
    patience: int = option(5, help="Evaluations without improvement before the run stops.", low=1)
    min_delta: float = option(0.0, help="The least change that is an improvement.", low=0.0)
    mode: Literal["min", "max"] = option("min", help="Whether less or more of the metric is better.")


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    return [
        AdapterRecord(
            name="full",
            summary="Full fine-tuning: every weight trains.",
            options=Full,
            build="luthier.builtin.full:FullTuning",
            needs={"dense-weights"},
            provides={"trainable-weights"},
        )
    ]


@hookimpl
def luthier_losses() -> list[LossRecord]:
    return [
        LossRecord(
            name="sft",
            summary="Next-token cross-entropy over the supervised tokens.",
            options=Sft,
            build="luthier.builtin.sft:SupervisedLoss",
            reference="luthier.builtin.sft:reference",
        )
    ]


@hookimpl
def luthier_optimizers() -> list[OptimizerRecord]:
    return [
        OptimizerRecord(
            name="adamw", summary="AdamW, fused.", options=AdamW, build="luthier.builtin.optimizers:FusedAdamW"
        ),
        OptimizerRecord(
            name="sgd",
            summary="Stochastic gradient descent with momentum.",
            options=Sgd,
            build="luthier.builtin.optimizers:MomentumSgd",
        ),
    ]


@hookimpl
def luthier_quantizers() -> list[QuantizerRecord]:
    return [
        QuantizerRecord(
            name="none",
            summary="The weights as they were loaded.",
            options=NoQuantizer,
            build="luthier.builtin.none:Unquantized",
            provides={"dense-weights"},
        )
    ]


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="local",
            summary="Training in this process.",
            options=Local,
            build="luthier.builtin.local:InProcess",
            provides={"luthier:in-process"},
        )
    ]


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [
        CallbackRecord(
            name="jsonl",
            summary="Metrics as JSON lines in metrics.jsonl.",
            options=Jsonl,
            build="luthier.builtin.jsonl:JsonLines",
        ),
        CallbackRecord(
            name="progress",
            summary="A progress bar with loss, speed and time left.",
            options=ProgressBar,
            build="luthier.builtin.progress:ProgressView",
        ),
        CallbackRecord(
            name="plot",
            summary="The loss over the steps, drawn to loss.png at the end.",
            options=Plot,
            build="luthier.builtin.plot:LossPlot",
        ),
        CallbackRecord(
            name="early_stopping",
            summary="Stops a run whose metric no longer improves.",
            options=EarlyStopping,
            build="luthier.builtin.early_stopping:Stopper",
        ),
    ]
