"""Every method with options that fit the tiny models, and an adapter attached to one; one torch thread."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from luthier import Progress
from luthier.testing import context
from luthier.testing.worlds import tiny_model
from luthier_peft.adapter import PeftAdapter, build
from luthier_peft.methods import METHODS
from luthier_peft.options import options_class

torch.set_num_threads(1)

QV = ["q_proj", "v_proj"]
# PEFT's defaults are made for layers of thousands; these fit layers of 16 to 48
FITTING: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 50},
    "frod": {"progressbar": False},
    "gralora": {"r": 8, "alpha": 8},
    "ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm", "norm"]},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 8},
    "psoft": {"r": 8},
    "pvera": {"r": 8},
    "randlora": {"r": 8},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "supertuning": {"sparsity": 0.9},
    "trainable_tokens": {"target_modules": ["embed_tokens"], "token_indices": list(range(7, 263))},
    "vblora": {"vector_length": 8, "num_vectors": 16},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}
SAMPLE = ("lora", "adalora", "ia3", "oft", "vblora", "ln_tuning", "lily")  # in the quick suite: one of each make


def every_method(*, sample: tuple[str, ...] = SAMPLE) -> list[Any]:
    """pytest parameters: all methods, those outside the sample marked slow."""
    return [pytest.param(name, marks=() if name in sample else pytest.mark.slow, id=name) for name in METHODS]


def fitting(method: str, **changes: Any) -> Any:
    """Options of a method that fit a tiny Llama."""
    given = {"target_modules": QV, **FITTING.get(method, {}), **changes}
    return options_class(method)(**given)


class World:
    """A tiny model, and the same one with an adapter attached."""

    def __init__(self, options: Any, *, architecture: str = "llama", seed: int = 0, steps: int = 10, **changes: Any):
        self.base = tiny_model(architecture, **changes)
        self.model = copy.deepcopy(self.base)
        self.part: PeftAdapter = build(options)
        self.context = context_of(self.model, seed, steps)
        self.part.attach(self.model, self.context)
        self.steps, self.done = steps, 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.part.groups() for p in group.parameters]

    def train(self, steps: int, rate: float = 5e-3, optimizer: Any = None) -> list[float]:
        """Losses of plain AdamW steps on one document."""
        used = optimizer or torch.optim.AdamW([g.settings(0.0) for g in self.part.groups()], lr=rate)
        losses = []
        self.model.train()
        for _ in range(steps):
            torch.manual_seed(self.done)
            used.zero_grad(set_to_none=True)
            loss = self.model(input_ids=IDS, labels=IDS, use_cache=False).loss
            losses.append(loss.item())
            loss.backward()
            penalty = self.part.penalty()
            if penalty is not None:
                penalty.backward()
            self.part.gradients_ready()
            used.step()
            self.done += 1
            self.part.stepped(Progress(step=self.done, total_steps=self.steps, epoch=0.0))
        return losses

    def outputs(self) -> torch.Tensor:
        return outputs(self.model)


IDS = torch.randint(7, 263, (1, 14), generator=torch.Generator().manual_seed(5))


def outputs(model: Any) -> torch.Tensor:
    """[1, T, V] without dropout or gradient."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    return float((found - expected).abs().max())


def context_of(model: Any, seed: int = 0, steps: int = 10, probe: Any = lambda model: None) -> Any:
    """The engine's context, with a probe of the test's own: the model keeps transformers' attention here."""
    import attrs

    return attrs.evolve(context(model, seed, steps), probe=probe)
