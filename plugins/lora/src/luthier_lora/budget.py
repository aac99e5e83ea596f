"""AdaLoRA's budget: how many ranks remain after each step, and which, by their importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from luthier import Context, LuthierError
from torch import Tensor, nn

from luthier_lora.options import AdaLora
from luthier_lora.wrappers import AdaLoraLayer


class Budget:
    """The smoothed importance of every entry, and the kept ranks (Zhang et al. 2023, arXiv 2303.10512)."""

    def __init__(self, options: AdaLora, num_layers: int, total_steps: int) -> None:
        self.options, self.total_steps = options, total_steps
        self.first, self.last = options.init_r * num_layers, options.target_r * num_layers
        self.means: dict[str, Tensor] = {}  # mean of |w dL/dw|
        self.doubts: dict[str, Tensor] = {}  # mean of its distance from its mean
        self.kept: dict[str, list[bool]] | None = None

    @property
    def settled_at(self) -> int:
        """Return the step after which no rank is removed."""
        return self.total_steps - self.options.tfinal

    def ranks_at(self, step: int) -> int:
        """Return the number of ranks of all layers at a step. It falls from the first to the last by a cubic."""
        begin, end = self.options.tinit, self.settled_at
        if step <= begin:
            return self.first
        if step >= end:
            return self.last
        return int((self.first - self.last) * (1 - (step - begin) / (end - begin)) ** 3 + self.last)

    @torch.no_grad()
    def observe(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Update the means with one step's importance |w dL/dw| of every entry."""
        for name, value in values.items():
            importance = (value * gradients[name]).abs()
            mean, doubt = (averages.get(name, torch.zeros_like(importance)) for averages in (self.means, self.doubts))
            self.means[name] = self.options.beta1 * mean + (1 - self.options.beta1) * importance
            far = (importance - self.means[name]).abs()
            self.doubts[name] = self.options.beta2 * doubt + (1 - self.options.beta2) * far

    def is_due(self, step: int) -> bool:
        """Return True if ranks are removed after this step."""
        return step == self.settled_at or (
            self.options.tinit < step < self.settled_at and step % self.options.deltaT == 0
        )

    def choose(self, layers: list[str], num_ranks: int) -> None:
        """Keep the `num_ranks` most important ranks of all layers."""
        scores = {layer: self.score_ranks(layer) for layer in layers}
        every = torch.cat([scores[layer] for layer in layers])
        mask = torch.zeros(len(every), dtype=torch.bool)
        mask[every.cpu().argsort(descending=True, stable=True)[:num_ranks]] = True
        parts = mask.split([len(scores[layer]) for layer in layers])
        self.kept = {layer: part.tolist() for layer, part in zip(layers, parts, strict=True)}

    def score_ranks(self, layer: str) -> Tensor:
        """Return [r]: the importance of E's entry plus the mean ones of A's row and B's column (mean times doubt)."""
        a, b, e = (
            self.means[f"{layer}.{side}"] * self.doubts[f"{layer}.{side}"] for side in ("lora_A", "lora_B", "lora_E")
        )
        return e[:, 0] + a.mean(1) + b.mean(0)

    def state(self) -> dict[str, Any]:
        return {"means": self.means, "doubts": self.doubts, "kept": self.kept}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.means = {name: tensor.to(device, copy=True) for name, tensor in state["means"].items()}
        self.doubts = {name: tensor.to(device, copy=True) for name, tensor in state["doubts"].items()}
        self.kept = state["kept"]


def make_budget(options: AdaLora, num_layers: int, context: Context) -> Budget:
    """Return the budget of a run. Raises `recipe-conflict` if it has too few steps for ranks to fall."""
    total = context.total_steps
    if context.purpose == "open":
        return Budget(options, num_layers, max(total or 0, options.tinit + options.tfinal + 1))
    if total is None:
        problem, remedy = "ranks fall towards the end of a run, and this run has no known end", "Set max_steps."
        raise LuthierError("recipe-conflict", problem, where="adapter", remedy=remedy)
    if options.tinit >= total - options.tfinal:
        problem = (
            f"{total} steps minus tinit {options.tinit} and tfinal {options.tfinal} leave none in which ranks can fall"
        )
        raise LuthierError("recipe-conflict", problem, where="tinit", remedy="Lower tinit or tfinal, or train longer.")
    return Budget(options, num_layers, total)


def orthogonality(layers: Mapping[str, AdaLoraLayer]) -> Tensor:
    """Return the mean over every A and B of the Frobenius norm of P P^T - I (eq. 4 of the paper)."""
    norms = []
    for layer in layers.values():
        a, b = gather(layer.lora_A.weight), gather(layer.lora_B.weight)
        for gram in (a @ a.T, b.T @ b):
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return torch.stack(norms).mean()


def gather(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered from all ranks if it is sharded. Its gradient goes back to the shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def clear_rows(parameter: nn.Parameter, flags: list[bool]) -> None:
    """Set the rows that are not kept to zero, also in the shards of other ranks."""
    mask = torch.tensor(flags, dtype=parameter.dtype, device=parameter.device)[:, None]
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        shard = cast(DTensor, parameter)  # its data is one
        mask = distribute_tensor(mask, shard.device_mesh, shard.placements)
    parameter.mul_(mask)
