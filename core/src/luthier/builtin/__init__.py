"""The core's own parts, offered like anyone else's: full, sft, adamw, sgd, none, local and six callbacks."""

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
class Sft:
    label_smoothing: float = option(
        0.0, help="Share of each label's probability that is spread evenly over all tokens.", low=0.0, high=0.99
    )
    z_loss: float = option(
        0.0, help="Weight of the squared logarithm of the softmax's denominator.", low=0.0, high=10.0
    )
    dft: bool = option(False, help="Weight each token by the probability that the model gives it (DFT).")

    def __attrs_post_init__(self) -> None:
        if self.dft and self.label_smoothing:
            problem = "dft weights a token by the probability of its label, and smoothing has no single label"
            where, remedy = "Sft.label_smoothing", "Leave it at 0, or dft off."
            raise LuthierError("recipe-conflict", problem, where=where, found=self.label_smoothing, remedy=remedy)


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
class Local:
    nproc_per_node: str | None = option(
        None, help="Processes of a submitted job, through torchrun: a number, gpu or cpu; none: one."
    )


@attrs.frozen(kw_only=True)
class Jsonl:
    also: list[Literal["mini_trainer", "trl"]] = option(
        factory=list, help="Trainers under whose names a line has its numbers as well: mini_trainer, trl."
    )


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


@attrs.frozen(kw_only=True)
class Profiler:
    wait: int = option(1, help="Steps before the trace's warm-up.", low=0)
    warmup: int = option(1, help="Steps that are traced and thrown away, as the tracer's own start takes time.", low=1)
    active: int = option(0, help="Steps in the Chrome trace; 0: no trace, only times by phase.", low=0)
    top: int = option(15, help="Operations of the trace in the table, by their own time.", low=1)


@attrs.frozen(kw_only=True)
class GpuSafety:
    max_temperature: float = option(85.0, help="Degrees Celsius above which training pauses.", low=30.0, high=120.0)
    resume_temperature: float = option(75.0, help="Degrees at or below which it goes on.", low=20.0, high=120.0)
    abort_temperature: float = option(
        95.0, help="Degrees at which the run ends at once, after a checkpoint.", low=30.0, high=130.0
    )
    max_power: float | None = option(None, help="Watts above which training pauses; none: any.", low=1.0)
    poll_seconds: float = option(5.0, help="Seconds between two looks at the sensors.", low=0.1)
    pause_seconds: float = option(30.0, help="Seconds that a pause lasts at least.", low=0.0)
    max_pause_seconds: float = option(1200.0, help="A pause that lasts longer ends the run.", low=1.0)
    max_pauses: int = option(10, help="Pauses of one run; where another would be due, it ends.", low=0)

    def __attrs_post_init__(self) -> None:
        if not self.resume_temperature < self.max_temperature < self.abort_temperature:
            raise LuthierError(
                "recipe-conflict",
                "resume_temperature must lie below max_temperature, and that below abort_temperature",
                where="GpuSafety",
                found=[self.resume_temperature, self.max_temperature, self.abort_temperature],
            )


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    return [
        AdapterRecord(
            name="full",
            summary="Full fine-tuning: every weight trains.",
            build="luthier.builtin.full:FullTuning",
            artifact="model",
            needs={"dense-weights"},
            provides={"trainable-weights"},
        )
    ]


@hookimpl
def luthier_losses() -> list[LossRecord]:
    return [
        LossRecord(
            name="sft",
            summary="Next-token cross-entropy over the supervised tokens, plain, smoothed, with a z-loss or as DFT.",
            options=Sft,
            build="luthier.builtin.sft:build_supervised_loss",
            perplexity=True,
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
            build="luthier.builtin.none:Unquantized",
            provides={"dense-weights"},
        )
    ]


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="local",
            summary="Training on this machine: in this process, or submitted to a worker process.",
            options=Local,
            build="luthier.builtin.local:WorkerProcesses",
            provides={"luthier:in-process"},
        )
    ]


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [*_showing_callbacks(), *_watching_callbacks()]


def _showing_callbacks() -> list[CallbackRecord]:
    """Return the callbacks that show the run's numbers; a recipe has them unless it says otherwise."""
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
            build="luthier.builtin.progress:ProgressView",
        ),
        CallbackRecord(
            name="plot",
            summary="The loss over the steps, drawn to loss.png at the end.",
            options=Plot,
            build="luthier.builtin.plot:LossPlot",
        ),
    ]


def _watching_callbacks() -> list[CallbackRecord]:
    """Return the callbacks that end, measure or pause a run."""
    return [
        CallbackRecord(
            name="early_stopping",
            summary="Stops a run whose metric no longer improves.",
            options=EarlyStopping,
            build="luthier.builtin.early_stopping:Stopper",
        ),
        CallbackRecord(
            name="profiler",
            summary="Time by phase and peak memory; with `active`, a Chrome trace of a few steps.",
            options=Profiler,
            build="luthier.builtin.profiler:PhaseProfiler",
        ),
        CallbackRecord(
            name="gpu_safety",
            summary="Pauses or ends a run whose GPU is too hot or draws too much.",
            options=GpuSafety,
            build="luthier.builtin.gpu_safety:Guardian",
            needs="cuda",
        ),
    ]
