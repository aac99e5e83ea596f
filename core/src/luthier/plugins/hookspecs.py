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
    """Return the adapters that this plugin offers. An adapter decides what of the model trains, and how."""
    return ()


@hookspec
def luthier_losses() -> Iterable[LossRecord]:
    """Return the losses that this plugin offers. A loss is what training minimises."""
    return ()


@hookspec
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    """Return the optimizers that this plugin offers. An optimizer turns gradients into a step."""
    return ()


@hookspec
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    """Return the quantizers that this plugin offers. A quantizer decides how the base model's weights are stored."""
    return ()


@hookspec
def luthier_providers() -> Iterable[ProviderRecord]:
    """Return the providers that this plugin offers.

    A provider trains a job elsewhere: another process, a service, a cluster.
    """
    return ()


@hookspec
def luthier_callbacks() -> Iterable[CallbackRecord]:
    """Return the callbacks that this plugin offers. A callback watches a run."""
    return ()


@hookspec
def luthier_operations() -> Iterable[OperationRecord]:
    """Return the operations that this plugin computes faster, with the same numbers.

    An installed operation is active without being named in the recipe.
    """
    return ()


@hookspec
def luthier_exporters() -> Iterable[ExporterRecord]:
    """Return the exporters that this plugin offers.

    An exporter writes a trained model in the format of another tool.
    """
    return ()


@hookspec
def luthier_metrics() -> Iterable[MetricRecord]:
    """Return the metrics that this plugin offers.

    A metric is a number about answers or tokens that an evaluation reports.
    """
    return ()


@hookspec
def luthier_penalties() -> Iterable[PenaltyRecord]:
    """Return the penalties that this plugin offers.

    A penalty adds a function of the trained weights to the objective of each step.
    """
    return ()


@hookspec
def luthier_trainers() -> Iterable[TrainerRecord]:
    """Return the trainers that this plugin offers.

    A trainer is another library's loop, which takes the steps of a run instead of Luthier's own.
    """
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
