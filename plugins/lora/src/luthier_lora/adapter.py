"""The adapter `lora` / `dora`: wraps layers, says what trains, saves, loads and merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier import Context, Group, LuthierError, Progress
from luthier_lora import files
from luthier_lora.layers import Form, LoraLayer, Switch, is_dense
from luthier_lora.merging import fold
from luthier_lora.options import Dora, Lora
from luthier_lora.targets import Targets, find_targets


class LoraAdapter:
    """Keeps the adapter protocol for the options of `lora` and `dora`."""

    def __init__(self, options: Lora | Dora) -> None:
        self.options = options
        self.model: Any = None
        self.targets = Targets()
        self._switch = Switch()

    def attach(self, model: Any, context: Context) -> Any:
        """Wrap what the options target and freeze the rest. `model-target` where a target matches nothing."""
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise LuthierError(
                "part-unsupported", "this model carries an adapter already", remedy="Merge it, or load the model again."
            )
        self.targets = find_targets(model, self.options)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(context.seed)
        for name in self.targets.layers:
            layer = self._wrapped(model.get_submodule(name), context)
            _draw(layer, self.options.init_lora_weights, generator)
            model.set_submodule(name, layer)
        self.model = model
        return model

    def groups(self) -> list[Group]:
        return [Group(parameters=list(self._named.values()), names=list(self._named), role="adapter")]

    def prepare(self, batch: Any) -> Any:
        return batch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self._switch.enabled = self._switch.enabled, False
        try:
            yield
        finally:
            self._switch.enabled = before

    def gradients_ready(self) -> None:
        """Gradients stay as they are."""

    def stepped(self, progress: Progress) -> None:
        """Nothing follows a step."""

    def penalty(self) -> None:
        return None

    def state(self) -> dict[str, Tensor]:
        """PEFT's tensor names and the parameters themselves, detached and not copied."""
        return {files.PREFIX + name: parameter.detach() for name, parameter in self._named.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        files.fill(self.state(), state, "adapter state", "checkpoint-corrupt")

    def save(self, folder: Path) -> None:
        files.save(folder, self.model, self.options, self.targets, self.state())

    def load(self, folder: Path) -> None:
        files.load(folder, self.options, self.state())

    def merge(self, context: Context) -> Any:
        """The model with plain layers. NaN in the adapter, or a weight that overflows, is `artifact-unmergeable`."""
        if self.model is None:
            raise LuthierError("artifact-unmergeable", "no adapter is attached, or it is merged already")
        model, self.model = fold(self.model, context), None
        return model

    def begin_task(self, index: int) -> None:
        """Training goes on from the last task's update."""

    def end_task(self, index: int) -> None:
        """Nothing to close."""

    @property
    def _named(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if ".lora_" in name}

    def _wrapped(self, layer: nn.Module, context: Context) -> LoraLayer:
        rank, alpha = self.options.r, self.options.lora_alpha
        tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        form = Form(
            rank=rank,
            scale=alpha / rank**0.5 if self.options.use_rslora else alpha / rank,
            dropout=self.options.lora_dropout,
            dtype=torch.float64 if is_dense(layer) and tensors[0].dtype is torch.float64 else torch.float32,
            device=tensors[0].device if tensors else context.device,
        )
        return LoraLayer(layer, form, self._switch, context.dequantize)


def _draw(layer: LoraLayer, zero: bool, generator: torch.Generator) -> None:
    """A Kaiming-uniform with a = sqrt(5) as in PEFT, B zero or drawn like A; on the CPU, so that devices agree."""
    for factor in (layer.lora_A,) if zero else (layer.lora_A, layer.lora_B):
        drawn = torch.empty(factor.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        with torch.no_grad():
            factor.weight.copy_(drawn)
