"""Luthier: fine-tune language models out of interchangeable parts. Importing it loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "luthier.api": ("train", "plan", "inspect", "generate", "merge"),
    "luthier.engine.result": ("Run",),
    "luthier.engine.batch": ("Batch",),
    "luthier.callbacks": ("on",),
    "luthier.recipe": ("Recipe",),
    "luthier.errors": ("LuthierError",),
    "luthier.logs": ("get_logger",),
    "luthier.plugins.hookspecs": ("hookimpl",),
    "luthier.plugins.events": ("event",),
    "luthier.plugins.options": ("option",),
    "luthier.plugins.records": (
        "AdapterRecord",
        "LossRecord",
        "OptimizerRecord",
        "QuantizerRecord",
        "ProviderRecord",
        "CallbackRecord",
    ),
    "luthier.plugins.protocols": ("Adapter", "Callback", "Loss", "Optimizer", "Quantizer"),
    "luthier.plugins.policy_protocol": ("Policy",),
    "luthier.plugins.values": ("Context", "Group", "LossOutput", "Multipliers", "Progress"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from luthier.api import generate, inspect, merge, plan, train
    from luthier.callbacks import on
    from luthier.engine.batch import Batch
    from luthier.engine.result import Run
    from luthier.errors import LuthierError
    from luthier.logs import get_logger
    from luthier.plugins.events import event
    from luthier.plugins.hookspecs import hookimpl
    from luthier.plugins.options import option
    from luthier.plugins.policy_protocol import Policy
    from luthier.plugins.protocols import Adapter, Callback, Loss, Optimizer, Quantizer
    from luthier.plugins.records import (
        AdapterRecord,
        CallbackRecord,
        LossRecord,
        OptimizerRecord,
        ProviderRecord,
        QuantizerRecord,
    )
    from luthier.plugins.values import Context, Group, LossOutput, Multipliers, Progress
    from luthier.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
