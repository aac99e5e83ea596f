"""AdaLoRA's budget: ranks of unimportant layers are removed after each step (arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from luthier import LuthierError, Progress
from peft import PeftModel
from torch import Tensor

from luthier_peft.files import ADAPTER

AVERAGES: Final = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Budget:
    """The driver of PEFT's rank allocator, with the state that a checkpoint needs."""

    def __init__(self, handle: PeftModel, total_steps: int | None, where: str) -> None:
        config: Any = handle.peft_config[ADAPTER]
        self.tuner: Any = handle.base_model
        self.config = config
        self._gradients: dict[Tensor, Tensor | None] = {}
        settled = config.total_step - config.tfinal
        if total_steps and total_steps < settled:
            problem = f"the ranks reach target_r at step {settled}, but the run has {total_steps} steps"
            raise LuthierError("recipe-conflict", problem, where=where, remedy="Leave total_step out, or lower it.")

    def hold_gradients(self) -> None:
        """Keep the gradients of this step: they are read after the step, when the loop may have freed them."""
        self._gradients = {p: p.grad for p in self._parameters()}

    def allocate(self, progress: Progress) -> None:
        """Update the importance |w dL/dw| of each entry, and mask the ranks over budget, as PEFT does."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient if gradient is not None else torch.zeros_like(parameter)
        self.tuner.update_and_allocate(progress.step)
        self._gradients = {}

    def penalty(self) -> Tensor | None:
        """Return `orth_reg_weight` times the mean over A and B of the Frobenius norm of P P^T - I (eq. 4 there)."""
        if not self.config.orth_reg_weight:
            return None
        norms = []
        for name, matrix in self._matrices():
            gram = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def state(self) -> dict[str, Any]:
        allocator = self.tuner.rankallocator
        averages = {name: dict(getattr(allocator, name)) for name in AVERAGES}
        return {"averages": averages, "rank_pattern": self.config.rank_pattern}

    def load_state(self, state: Mapping[str, Any]) -> None:
        homes = dict(self.tuner.model.named_parameters())
        for name in AVERAGES:
            averages = {n: t.to(homes[n].device, copy=True) for n, t in state["averages"][name].items()}
            setattr(self.tuner.rankallocator, name, averages)
        self.config.rank_pattern = state["rank_pattern"]

    @contextmanager
    def pattern_for(self, file_pattern: dict[str, list[bool]] | None) -> Iterator[None]:
        """Give PEFT's config another pattern, which decides what it prunes while saving and the shapes it loads."""
        before = self.config.rank_pattern
        self.config.rank_pattern = file_pattern
        try:
            yield
        finally:
            self.config.rank_pattern = before

    def settled_pattern(self) -> dict[str, list[bool]] | None:
        """Return the kept ranks if all others are zero at the moment, or None while pruned ranks change.

        PEFT leaves pruned ranks out of the file. Between two masks the optimizer changes them again, and the file would
        not be what the model computes.
        """
        pattern = self.config.rank_pattern
        if pattern is None:
            return None
        named = self.tuner.model.named_parameters()
        singular = {name.replace(f".{ADAPTER}", ""): p for name, p in named if "lora_E" in name}
        for name, mask in pattern.items():
            values = singular[name.replace(f".{ADAPTER}", "")].detach().flatten()
            if values[~torch.tensor(mask, dtype=torch.bool, device=values.device)].any():
                return None
        return pattern

    def unpruned(self, tensors: dict[str, Tensor], pattern: Mapping[str, list[bool]] | None) -> dict[str, Tensor]:
        """Return the tensors of a file at full rank, with zeros for pruned ranks.

        PEFT would shrink the parameters instead, which the optimizer still steps.
        """
        full = dict(tensors)
        for name, mask in (pattern or {}).items():
            rows = torch.tensor(mask, dtype=torch.bool)
            layer = "base_model.model." + name.replace(f".{ADAPTER}", "").removesuffix(".lora_E")
            for part in ("lora_A", "lora_B", "lora_E"):
                given = tensors.get(f"{layer}.{part}")
                dim = 1 if part == "lora_B" else 0
                if given is not None and given.shape[dim] == int(
                    rows.sum()
                ):  # otherwise `put` reports that it does not fit
                    full[f"{layer}.{part}"] = _spread(given, rows, dim)
        return full

    def _matrices(self) -> list[tuple[str, Tensor]]:
        named = self.tuner.model.named_parameters()
        return [(name, p) for name, p in named if "lora_A." in name or "lora_B." in name]

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.tuner.model.parameters() if p.requires_grad]


def _spread(tensor: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Return `tensor` at the full length of `rows`, where its dimension `dim` has the True ones."""
    shape = list(tensor.shape)
    shape[dim] = len(rows)
    return tensor.new_zeros(shape).index_copy(dim, rows.nonzero().flatten(), tensor)
