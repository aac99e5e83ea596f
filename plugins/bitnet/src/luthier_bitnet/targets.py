"""Choose the layers to quantize: dense ones except head, routers, tied weights and `skip_modules`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from luthier import choose_dense_layers
from torch import nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

ROUTERS = ("gate", "router")  # last parts of paths: routers are small, and a wrong expert is costly


def choose_layers(model: nn.Module, skip_modules: Collection[str], name: str) -> dict[str, nn.Linear | Conv1D]:
    """Return path -> layer for every layer that the quantizer `name` trains."""
    return choose_dense_layers(model, name, skip_modules, ROUTERS)
