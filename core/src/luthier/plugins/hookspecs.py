"""The hooks: one function for each kind of part. The core calls each hook once and gets an iterable of records."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from luthier.plugins.records import (
    AdapterRecord,
    BenchmarkRecord,
    CallbackRecord,
    EngineRecord,
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
    """Return adapters. An adapter decides which weights of the model train, and adds weights of its own."""
    return ()


@hookspec
def luthier_losses() -> Iterable[LossRecord]:
    """Return losses. A loss is the objective that training minimises."""
    return ()


@hookspec
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    """Return optimizers. An optimizer turns gradients into a step."""
    return ()


@hookspec
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    """Return quantizers. A quantizer stores the weights of the base model in fewer bits."""
    return ()


@hookspec
def luthier_providers() -> Iterable[ProviderRecord]:
    """Return providers. A provider trains a job in another place: another process, a cluster, a hosted service."""
    return ()


@hookspec
def luthier_callbacks() -> Iterable[CallbackRecord]:
    """Return callbacks. A callback watches a run and hears its events."""
    return ()


@hookspec
def luthier_operations() -> Iterable[OperationRecord]:
    """Return operations. An operation computes one of the engine's formulas faster, with the same numbers.

    An installed operation is used without being named in the recipe.
    """
    return ()


@hookspec
def luthier_exporters() -> Iterable[ExporterRecord]:
    """Return exporters. An exporter writes a trained model in the format of another tool."""
    return ()


@hookspec
def luthier_metrics() -> Iterable[MetricRecord]:
    """Return metrics. A metric is a number about answers or tokens that an evaluation reports."""
    return ()


@hookspec
def luthier_penalties() -> Iterable[PenaltyRecord]:
    """Return penalties. A penalty adds a function of the trained weights to the objective of each step."""
    return ()


@hookspec
def luthier_trainers() -> Iterable[TrainerRecord]:
    """Return trainers. A trainer runs the training loop of another library instead of Luthier's own."""
    return ()


@hookspec
def luthier_benchmarks() -> Iterable[BenchmarkRecord]:
    """Return benchmarks. A benchmark measures a trained model over tasks that it brings."""
    return ()


@hookspec
def luthier_engines() -> Iterable[EngineRecord]:
    """Return engines. An engine answers the prompts of an evaluation outside Luthier, such as a server."""
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
    "benchmark": "luthier_benchmarks",
    "engine": "luthier_engines",
}
