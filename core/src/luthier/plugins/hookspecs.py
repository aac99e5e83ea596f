"""The questions that the core asks every plugin. Each hook is called once and returns an iterable of records."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from luthier.plugins.records import (
    AdapterRecord,
    CallbackRecord,
    ExporterRecord,
    LossRecord,
    MetricRecord,
    OperationRecord,
    OptimizerRecord,
    PenaltyRecord,
    ProviderRecord,
    QuantizerRecord,
    TrainerRecord,
)

hookspec = pluggy.HookspecMarker("luthier")
hookimpl = pluggy.HookimplMarker("luthier")


@hookspec
def luthier_adapters() -> Iterable[AdapterRecord]:
    """Adapters: what of the model trains, and how."""
    return ()


@hookspec
def luthier_losses() -> Iterable[LossRecord]:
    """Losses: what is minimised."""
    return ()


@hookspec
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    """Optimizers: how a gradient becomes a step."""
    return ()


@hookspec
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    """Quantizers: how the base model's weights are stored."""
    return ()


@hookspec
def luthier_providers() -> Iterable[ProviderRecord]:
    """Providers: where a job trains."""
    return ()


@hookspec
def luthier_callbacks() -> Iterable[CallbackRecord]:
    """Callbacks: who watches a run."""
    return ()


@hookspec
def luthier_operations() -> Iterable[OperationRecord]:
    """Operations: what is computed faster, with the same numbers. An installed one is active without being named."""
    return ()


@hookspec
def luthier_exporters() -> Iterable[ExporterRecord]:
    """Exporters: formats of other tools that a trained model is written in."""
    return ()


@hookspec
def luthier_metrics() -> Iterable[MetricRecord]:
    """Metrics: numbers about answers or tokens that an evaluation reports."""
    return ()


@hookspec
def luthier_penalties() -> Iterable[PenaltyRecord]:
    """Penalties: what is added to the objective of each step for the weights that train."""
    return ()


@hookspec
def luthier_trainers() -> Iterable[TrainerRecord]:
    """Trainers: loops of other libraries, which take the steps of a run in the place of Luthier's own."""
    return ()


HOOKS = {
    "adapter": "luthier_adapters",
    "loss": "luthier_losses",
    "optimizer": "luthier_optimizers",
    "quantizer": "luthier_quantizers",
    "provider": "luthier_providers",
    "callback": "luthier_callbacks",
    "operation": "luthier_operations",
    "exporter": "luthier_exporters",
    "metric": "luthier_metrics",
    "penalty": "luthier_penalties",
    "trainer": "luthier_trainers",
}
