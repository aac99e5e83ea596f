"""The part `adalora`: LoRA with a singular value for each rank, and a budget that removes ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from luthier import PEFT_CONFIG, PEFT_WEIGHTS, Context, Progress, fill_tensors, peft_misfit, read_peft_config
from torch import Tensor, nn

from luthier_lora import files
from luthier_lora.adapter import LoraAdapter
from luthier_lora.budget import Budget, clear_rows, gather, make_budget, orthogonality
from luthier_lora.layers import Form
from luthier_lora.merging import Update, wrappers
from luthier_lora.options import AdaLora, Lora
from luthier_lora.wrappers import AdaLoraLayer, LoraLayer

ENDS = ("lora_A", "lora_B", "lora_E")


class AdaLoraAdapter(LoraAdapter):
    """The adapter for the options of `adalora`."""

    rank_option = "init_r"

    def __init__(self, options: AdaLora) -> None:
        shared = Lora(
            r=options.init_r,
            lora_alpha=options.lora_alpha,
            lora_dropout=options.lora_dropout,
            target_modules=options.target_modules,
            exclude_modules=options.exclude_modules,
        )
        super().__init__(shared)
        self.schedule = options
        self.budget: Budget
        self._gradients: dict[str, Tensor | None] = {}

    def attach(self, model: Any, context: Context) -> Any:
        model = super().attach(model, context)
        self.budget = make_budget(self.schedule, len(self.targets.layers), context)
        return model

    def gradients_ready(self) -> None:
        """Keep the gradients of this step: `stepped` reads them, clipped, when the loop may have freed them."""
        self._gradients = {name: parameter.grad for name, parameter in self._named().items()}

    def stepped(self, progress: Progress) -> None:
        """Update the mean importance of each entry, and remove the ranks over budget."""
        named, budget = self._named(), self.budget
        if progress.step < budget.settled_at or not budget.means:
            values = {name: gather(parameter.detach()) for name, parameter in named.items()}
            given = {n: values[n].new_zeros(()) if g is None else gather(g) for n, g in self._gradients.items()}
            budget.observe(values, given)
        if budget.is_due(progress.step):
            budget.choose(list(self.targets.layers), budget.ranks_at(progress.step))
        if budget.is_due(progress.step) or progress.step > budget.settled_at:
            self._clear()
        self._gradients = {}

    def penalty(self) -> Tensor | None:
        weight = self.schedule.orth_reg_weight
        return weight * orthogonality(self._layers()) if weight else None

    def state(self) -> dict[str, Any]:
        return {"parameters": super().state(), "budget": self.budget.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        fill_tensors(super().state(), state.get("parameters", {}), "adapter state", "checkpoint-corrupt")
        self.budget.load_state(state["budget"], next(iter(self._named().values())).device)

    def save(self, folder: Path) -> None:
        """Write a folder that plain PEFT loads, without the removed ranks."""
        masks = self._settled()
        tensors = {name: _cut(name, tensor, masks) for name, tensor in super().state().items()}
        config = files.describe(
            self.model, attrs.evolve(self.options, init_lora_weights=True), self.targets, self.extras
        )
        own = {field.name: getattr(self.schedule, field.name) for field in attrs.fields(AdaLora)}
        named = {name: config[name] for name in ("target_modules", "exclude_modules", "lora_dropout")}
        pattern = {f"{layer}.lora_E": ranks for layer, ranks in masks.items()} or None
        files.save(
            Path(folder),
            {**config, **own, **named, "peft_type": "ADALORA", "r": 8, "total_step": self.budget.total_steps,
             "rank_pattern": pattern},
            tensors,
        )  # fmt: skip

    def load(self, folder: Path) -> None:
        """Read a folder of ours or PEFT's, with zeros for removed ranks. An error changes nothing."""
        folder = Path(folder)
        config = read_peft_config(folder, files.ADALORA)
        for name in ("init_r", "lora_alpha"):
            if config.get(name) != getattr(self.schedule, name):
                problem = f"the adapter has {name} {config.get(name)!r}, the options {getattr(self.schedule, name)!r}"
                raise peft_misfit(folder / PEFT_CONFIG, problem)
        masks = {name.removesuffix(".lora_E"): ranks for name, ranks in (config.get("rank_pattern") or {}).items()}
        state = super().state()
        own = files.read_own(folder, self.model, state)
        tensors = {name: _spread(name, tensor, masks) for name, tensor in own.items()}
        fill_tensors(state, tensors, str(folder / PEFT_WEIGHTS), "artifact-mismatch")
        self.budget.kept = masks or None

    def _class(self) -> type[LoraLayer]:
        return AdaLoraLayer

    def _form(self, name: str, module: nn.Module, context: Context) -> Form:
        rank = self.schedule.init_r
        return attrs.evolve(super()._form(name, module, context), scale=self.schedule.lora_alpha / (rank + 1e-5))

    @torch.no_grad()
    def _draw(self, wrapper: Update, generator: torch.Generator) -> None:
        """Draw A and B from a normal distribution with deviation 0.02, as the paper's code does. E is zero."""
        for factor in (wrapper.lora_A, wrapper.lora_B):
            drawn = torch.empty(factor.weight.shape, dtype=torch.float32)
            factor.weight.copy_(drawn.normal_(std=0.02, generator=generator))

    def _layers(self) -> dict[str, AdaLoraLayer]:
        return {name: layer for name, layer in wrappers(self.model).items() if isinstance(layer, AdaLoraLayer)}

    def _clear(self) -> None:
        for name, layer in self._layers().items():
            clear_rows(layer.lora_E, (self.budget.kept or {}).get(name, [True] * self.schedule.init_r))

    def _settled(self) -> dict[str, list[bool]]:
        """Return the kept ranks. The others are set to 0, since the optimizer moves them between two choices."""
        masks = self.budget.kept or {}
        for name, layer in self._layers().items():
            if name in masks and gather(layer.lora_E.detach()).cpu()[~torch.tensor(masks[name])].any():
                return {}
        return masks


def _layer_of(name: str) -> str:
    return name.removeprefix(files.PREFIX).rpartition(".")[0]


def _cut(name: str, tensor: Tensor, flags: Mapping[str, list[bool]]) -> Tensor:
    """Return a tensor of a layer without the removed ranks."""
    ranks = flags.get(_layer_of(name))
    if ranks is None:
        return tensor
    mask = torch.tensor(ranks, device=tensor.device)
    return tensor[:, mask] if name.endswith("lora_B") else tensor[mask]


def _spread(name: str, tensor: Tensor, flags: Mapping[str, list[bool]]) -> Tensor:
    """Return a tensor of a file at full rank, or as it is if its size does not match its pattern."""
    ranks = flags.get(_layer_of(name))
    dim = 1 if name.endswith("lora_B") else 0
    if ranks is None or tensor.shape[dim] != sum(ranks):
        return tensor
    shape = [len(ranks) if index == dim else size for index, size in enumerate(tensor.shape)]
    return tensor.new_zeros(shape).index_copy(dim, torch.tensor(ranks).nonzero().flatten(), tensor)
