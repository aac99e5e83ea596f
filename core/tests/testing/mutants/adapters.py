"""Adapters: one that is sound, and those that break one rule each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from luthier.plugins.contracts.values import Context, Group, Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class Added(nn.Module):
    """A layer with scale * up(down(x)) beside it; `up` begins at zero."""

    def __init__(self, base: Any, options: Any, chance: torch.Generator, device: torch.device) -> None:
        super().__init__()
        self.base, self.options, self.active = base, options, True
        down = torch.randn(options.rank, base.in_features, generator=chance) / options.rank
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, options.rank, device=device))

    def forward(self, states: Tensor) -> Tensor:
        output = self.base(states)
        return output + self.update(states) if self.active else output

    def update(self, states: Tensor) -> Tensor:
        dropped = F.dropout(states, self.options.dropout, self.training)
        return self.options.scale * dropped @ self.down.T @ self.up.T

    def weight(self) -> Tensor:
        """[out, in]"""
        return self.options.scale * self.up.detach() @ self.down.detach()


class LowRank:
    """Keeps the `Adapter` protocol on the query and value projections."""

    layer = Added
    ends = ("q_proj", "v_proj")

    def __init__(self, options: Any) -> None:
        self.options = options
        self.layers: dict[str, Any] = {}

    def attach(self, model: Any, context: Context) -> Any:
        chance = torch.Generator().manual_seed(context.seed)
        self.model = model.requires_grad_(False)
        for path, layer in [(n, m) for n, m in model.named_modules() if n.endswith(self.ends)]:
            self.layers[path] = self.layer(layer, self.options, chance, self.place_of(context))
            self.place(path, self.layers[path])
        return model

    def place_of(self, context: Context) -> torch.device:
        return context.device

    def place(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, layer)

    def groups(self) -> list[Group]:
        named = self.named()
        return [Group(parameters=list(named.values()), names=list(named), role="adapter")]

    def named(self) -> dict[str, nn.Parameter]:
        sides = ((f"{n}.{side}", getattr(m, side)) for n, m in self.layers.items() for side in ("down", "up"))
        return dict(sides)

    def prepare(self, batch: Any) -> Any:
        return batch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.switch(False)
        try:
            yield
        finally:
            self.switch(True)

    def switch(self, active: bool) -> None:
        for layer in self.layers.values():
            layer.active = active

    def gradients_ready(self) -> None: ...

    def stepped(self, progress: Progress) -> None: ...

    def penalty(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {name: parameter.detach() for name, parameter in self.named().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.named().items():
                if name in state:
                    parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        save_file({n: t.clone() for n, t in self.state().items()}, folder / "adapter.safetensors")

    def load(self, folder: Path) -> None:
        self.load_state(load_file(folder / "adapter.safetensors"))

    def merge(self, context: Context) -> Any:
        for path, layer in self.layers.items():
            context.requantize(layer.base, context.dequantize(layer.base) + self.delta(layer))
            self.place(path, layer.base)
        return self.model

    def delta(self, layer: Any) -> Tensor:
        return layer.weight()


class DrawsByChance(LowRank):
    def attach(self, model, context):
        super().attach(model, context)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.down.mul_(1 + random.SystemRandom().random())
        return model


class StaysOnTheProcessor(LowRank):
    def place_of(self, context):
        return torch.device("cpu")


class MeasuresItsShard(LowRank):
    """After each step it shrinks its weights by a norm, which on a sharded rank is that of the shard."""

    @torch.no_grad()
    def stepped(self, progress):
        for layer in self.layers.values():
            held = layer.up.to_local() if hasattr(layer.up, "to_local") else layer.up
            layer.up.div_(0.01 + float(held.norm()))


class OffInGeneration(LowRank):
    """Its layers do nothing where the model runs without the run's batch."""

    def generating(self, inputs):
        self.switch(False)
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}

    def prepare(self, batch):
        self.switch(True)
        return batch


class ForgetsThePrompt(LowRank):
    """It puts two tokens before each document, and generation knows nothing of them."""

    def virtual_tokens(self):
        return 2

    def prepare(self, batch):
        return batch.insert_virtual(2)

    def generating(self, inputs):
        return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


class WritesNothing(LowRank):
    def save(self, folder):
        (folder / "empty.json").write_text("{}")

    def load(self, folder):
        pass


class StartsElsewhere(LowRank):
    def attach(self, model, context):
        super().attach(model, context)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.up.fill_(0.1)
        return model


class ChangesClass(LowRank):
    def attach(self, model, context):
        super().attach(model, context).__class__ = type("Wrapped", (type(model),), {})
        return model


class LeavesTrainable(LowRank):
    """Forgets to freeze the layers that it wraps."""

    def attach(self, model, context):
        super().attach(model, context)
        for layer in self.layers.values():
            layer.base.requires_grad_(True)
        return model


class ErodesBase(LowRank):
    def stepped(self, progress):
        with torch.no_grad():
            for layer in self.layers.values():
                layer.base.weight.mul_(0.999)


class GroupsTwice(LowRank):
    def groups(self):
        return super().groups() * 2


class ForgetsAGroup(LowRank):
    def groups(self):
        named = {n: p for n, p in self.named().items() if n.endswith("up")}
        return [Group(parameters=list(named.values()), names=list(named), role="adapter")]


class CutsGradient(LowRank):
    class layer(Added):
        def update(self, states):
            return self.options.scale * states @ self.down.detach().T @ self.up.T


class SavesHalf(LowRank):
    def state(self):
        return {n: t for n, t in super().state().items() if n.endswith("up")}


class CountsAlone(LowRank):
    """Shrinks itself at its third step, and has forgotten its steps after a resume."""

    steps = 0

    def stepped(self, progress):
        self.steps += 1
        if self.steps == 3:
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.up.mul_(0.5)


class Pickles(LowRank):
    def save(self, folder):
        torch.save(self.state(), folder / "adapter.bin")

    def load(self, folder):
        self.load_state(torch.load(folder / "adapter.bin", weights_only=True))


class WritesHalf(LowRank):
    def save(self, folder):
        held = {n: t.clone() for n, t in self.state().items() if n.endswith("up")}
        save_file(held, folder / "adapter.safetensors")


class MergesUnscaled(LowRank):
    def delta(self, layer):
        return layer.weight() / (2 * self.options.scale)


class KeepsWrappers(LowRank):
    def merge(self, context):
        return self.model


class StaysOn(LowRank):
    def switch(self, active): ...


class StaysOff(LowRank):
    def switch(self, active):
        super().switch(False)


class LooksAround(LowRank):
    """Adds the mean over the whole packed row, other documents and all."""

    class layer(Added):
        def update(self, states):
            return super().update(states + states.mean(1, keepdim=True))


class NeedsAWeight(LowRank):
    class layer(Added):
        def __init__(self, base, options, chance, device):
            super().__init__(base, options, chance, device)
            self.shape = tuple(base.weight.shape)


class WritesCodes(LowRank):
    def stepped(self, progress):
        for layer in self.layers.values():
            if hasattr(layer.base, "scales"):
                layer.base.scales.mul_(1.01)


class MergesAlone(LowRank):
    """Puts the update in the place of a quantized weight, rather than on it."""

    def merge(self, context):
        for path, layer in self.layers.items():
            held = 0 if hasattr(layer.base, "codes") else layer.base.weight.detach()
            context.requantize(layer.base, held + layer.weight())
            self.place(path, layer.base)
        return self.model


class ReadsNoDropout(LowRank):
    class layer(Added):
        def update(self, states):
            return self.options.scale * states @ self.down.T @ self.up.T
