"""The part `lora` / `dora`: wraps weights, says what trains, saves, loads and merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from luthier import Context, Group, LuthierError, Progress, get_logger
from torch import Tensor, nn

from luthier_lora import files
from luthier_lora.coverage import coverage
from luthier_lora.experts import ParameterWrapper
from luthier_lora.layers import Form, Switch
from luthier_lora.merging import Wrapper, fold, wrappers
from luthier_lora.options import Dora, Lora
from luthier_lora.targets import Targets, find_targets
from luthier_lora.wrappers import DoraLayer, LoraLayer


class LoraAdapter:
    """Keeps the adapter protocol for the options of `lora` and `dora`."""

    def __init__(self, options: Lora | Dora) -> None:
        if isinstance(options, Lora) and options.target_parameters and options.lora_dropout:
            problem = "a parameter's update has no inputs of its own that could be dropped"
            remedy = "Set lora_dropout: 0, or leave target_parameters out."
            raise LuthierError("recipe-conflict", problem, where="target_parameters", remedy=remedy)
        self.options = options
        self.model: Any = None
        self.targets = Targets()
        self._switch = Switch()

    def attach(self, model: Any, context: Context) -> Any:
        """Wrap what the options name and freeze the rest. A and B are drawn from the context's seed, on the CPU."""
        if wrappers(model):
            remedy = "Merge the adapter first, or load the model again."
            raise LuthierError("part-unsupported", "this model carries an adapter already", remedy=remedy)
        self.targets = find_targets(model, self.options)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(context.seed)
        for name in self.targets.layers:
            model.set_submodule(name, self._layer(model.get_submodule(name), context, generator))
        for name, parameter in self.targets.parameters:
            model.set_submodule(name, self._parameter(model.get_submodule(name), parameter, context, generator))
        self.model = model
        self._report()
        return model

    def groups(self) -> list[Group]:
        """The matrices; and DoRA's magnitudes, which must not decay towards a layer of zero."""
        matrices = {name: p for name, p in self._named().items() if p.dim() > 1}
        magnitudes = {name: p for name, p in self._named().items() if p.dim() == 1}
        groups = [_group(matrices, None)]
        return [*groups, _group(magnitudes, 0.0)] if magnitudes else groups

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
        """PEFT's name of each tensor, and the parameter itself, detached and not copied."""
        return {files.PREFIX + name: parameter.detach() for name, parameter in self._named().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        files.fill(self.state(), state, "adapter state", "checkpoint-corrupt")

    def save(self, folder: Path) -> None:
        """A folder that plain PEFT loads."""
        files.save(Path(folder), self.model, self.options, self.targets, self.state())

    def load(self, folder: Path) -> None:
        """Read a folder of ours or of PEFT's into the attached adapter, or raise and change nothing."""
        files.load(Path(folder), self.options, self.state())

    def merge(self, context: Context) -> Any:
        """The model with plain layers, which computes the same. `artifact-unmergeable` for NaN, or a second time."""
        if self.model is None:
            problem = "no adapter is attached, or it is merged already"
            raise LuthierError("artifact-unmergeable", problem, remedy="Attach it to a fresh base model.")
        model = fold(self.model, context)
        self.model, self.targets = None, Targets()
        return model

    def coverage(self) -> dict[str, Any]:
        """`matched` names, `reached_share` of all base weights, and `unreached` shares by kind."""
        return coverage(self.model, self.targets)

    def _named(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter by its path in the model."""
        assert self.model is not None, "the adapter is not attached"
        found = wrappers(self.model).items()
        return {f"{path}.{name}": p for path, wrapper in found for name, p in wrapper.own().items()}

    def _layer(self, layer: nn.Module, context: Context, generator: torch.Generator) -> LoraLayer:
        made = DoraLayer if isinstance(self.options, Dora) else LoraLayer
        wrapper = made(layer, self._form(layer, context), self._switch, context.dequantize)
        self._draw(wrapper, generator)
        if isinstance(wrapper, DoraLayer):
            wrapper.begin()
        return wrapper

    def _parameter(
        self, module: nn.Module, name: str, context: Context, generator: torch.Generator
    ) -> ParameterWrapper:
        inner = module.innermost if isinstance(module, ParameterWrapper) else module
        wrapper = ParameterWrapper(module, name, self._form(inner, context), self._switch)
        self._draw(wrapper, generator)
        return wrapper

    def _form(self, module: nn.Module, context: Context) -> Form:
        rank, alpha = self.options.r, self.options.lora_alpha
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        double = any(tensor.dtype is torch.float64 for tensor in tensors)
        return Form(
            rank=rank,
            scale=alpha / rank**0.5 if self.options.use_rslora else alpha / rank,
            dropout=self.options.lora_dropout,
            dtype=torch.float64 if double else torch.float32,
            device=tensors[0].device if tensors else context.device,
        )

    @torch.no_grad()
    def _draw(self, wrapper: Wrapper, generator: torch.Generator) -> None:
        """A Kaiming-uniform with a = sqrt(5) as PEFT has it; B stays zero, or is drawn like A."""
        factors = [wrapper.lora_A] if self.options.init_lora_weights else [wrapper.lora_A, wrapper.lora_B]
        for factor in factors:
            drawn = torch.empty(factor.weight.shape, dtype=torch.float32)
            factor.weight.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))

    def _report(self) -> None:
        """Say which weights were taken, as `all-linear` and the default leave that to the model."""
        counts: dict[str, int] = {}
        for name in self.targets.names:
            end = name.rpartition(".")[2]
            counts[end] = counts.get(end, 0) + 1
        chosen = "q and v, or what stands in their place" if self.options.target_modules is None else "as named"
        get_logger().info("adapter_attached", targets=counts, chosen=chosen, trainable=_size(self._named()))


def _group(named: dict[str, nn.Parameter], weight_decay: float | None) -> Group:
    parameters, names = list(named.values()), list(named)
    return Group(parameters=parameters, names=names, role="adapter", weight_decay=weight_decay)


def _size(named: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in named.values())
