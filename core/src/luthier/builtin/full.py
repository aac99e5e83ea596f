"""Full fine-tuning, as an adapter: every weight of the model trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.model.weights.parameter_roles import by_role
from luthier.plugins.contracts.values import Context, Group, Progress
from luthier.plugins.records import NoOptions


class FullTuning:
    """Keeps the `Adapter` protocol. It has no base to fall back to, so it provides no reference."""

    artifact = "model"  # what `save` writes is a whole model

    def __init__(self, options: NoOptions) -> None:
        self.options = options
        self.model: Any = None

    def attach(self, model: Any, context: Context) -> Any:
        self.model = model.requires_grad_(True)
        self.save_model, self.load_model = context.save_model, context.load_model
        return model

    def groups(self) -> list[Group]:
        return by_role(self.model)

    def prepare(self, batch: Any) -> Any:
        return batch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        raise LuthierError("part-unsupported", "full fine-tuning keeps no copy of the base model")
        yield

    def gradients_ready(self) -> None: ...

    def stepped(self, progress: Progress) -> None: ...

    def penalty(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())

    def load_state(self, state: Mapping[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        if parameters.keys() != state.keys():
            differ = sorted(parameters.keys() ^ state.keys())[:3]
            raise LuthierError("checkpoint-corrupt", f"these weights are of another model; differing: {differ}")
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                shapes = f"{name} is {list(state[name].shape)} there, {list(parameter.shape)} here"
                raise LuthierError("checkpoint-corrupt", f"these weights are of another model: {shapes}")
        _copy(parameters, state)

    def save(self, folder: Path) -> None:
        self.save_model(self.model, folder)

    def load(self, folder: Path) -> None:
        loaded = self.load_model(folder, self.model)
        if loaded is not self.model:
            self.load_state(dict(loaded.named_parameters()))

    def merge(self, context: Context) -> Any:
        return self.model


def _copy(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
