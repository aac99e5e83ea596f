"""The parts `bitfit` and `modules`: some parameters of the model train in place, and the rest is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from luthier import Adapter, Context, Group, LuthierError, get_logger
from torch import Tensor, nn

from luthier_selective import BitFit, Modules, files
from luthier_selective.choosing import choose_parameters, is_norm
from luthier_selective.rows import EmbeddingRows, TokenRows, stand_in

Role = Literal["hidden", "embedding", "head", "norm", "bias", "adapter"]


class SelectiveAdapter(Adapter):
    """An adapter that trains parameters in place. It provides no reference, so the run keeps the initial weights."""

    def __init__(self, options: BitFit | Modules) -> None:
        self.options = options
        self.token_ids = (options.token_ids or []) if isinstance(options, Modules) else []
        self.model: Any = None

    def attach(self, model: Any, context: Context) -> Any:
        """Unfreeze what the options name, and freeze the rest. Everything is checked before anything changes."""
        names = choose_parameters(model, self.options)
        self._refuse_both(model, names)
        if self.token_ids:
            stand_in(model, self.token_ids, context.has_values)
        model.requires_grad_(False)
        chosen = {id(parameter) for parameter in self._places(model, names)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        self.model = model
        named = self._named()
        total = sum(p.numel() for p in model.parameters())
        get_logger().info(
            "adapter_attached", tensors=len(named), trainable=sum(p.numel() for p in named.values()), parameters=total
        )
        return model

    def groups(self) -> list[Group]:
        """Return a group for each role, so that norms and biases do not decay."""
        groups: dict[Role, Group] = {}
        for name, parameter in self._named().items():
            role = self._role(name)
            group = groups.setdefault(role, Group(parameters=[], names=[], role=role))
            group.parameters.append(parameter)
            group.names.append(name)
        return list(groups.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Raise `part-unsupported`, because weights train in place."""
        remedy = "Set reference: initial, for which the run keeps a copy of what trains."
        raise LuthierError(
            "part-unsupported", "weights train in place, so there is no base", where="adapter", remedy=remedy
        )
        yield

    def state(self) -> dict[str, Any]:
        return {name: parameter.detach() for name, parameter in self._named().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        files.fill_tensors(self.state(), state, "adapter state", "checkpoint-corrupt")

    def save(self, folder: Path) -> None:
        """Write the trained parameters alone, under their names in the model."""
        files.save_tensors(Path(folder), self._describe(), self.state())

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. An error changes nothing."""
        tensors = files.load_tensors(Path(folder), self._describe())
        files.fill_tensors(self.state(), tensors, str(Path(folder) / files.WEIGHTS), "artifact-mismatch")

    def merge(self, context: Context) -> Any:
        """Return the plain model. Raises `artifact-unmergeable` for NaN, before any weight changes."""
        for name, parameter in self._named().items():
            if not parameter.isfinite().all():
                raise LuthierError("artifact-unmergeable", "the adapter holds NaN or infinity", where=name)
        model, self.model = self.model, None
        for path, module in list(model.named_modules()):
            if isinstance(module, TokenRows):
                model.set_submodule(path, module.plain())
        return model.requires_grad_(False)

    def _describe(self) -> dict[str, Any]:
        method = "bitfit" if isinstance(self.options, BitFit) else "modules"
        base = getattr(self.model.config, "_name_or_path", None) or None
        return {"method": method, "token_ids": self.token_ids, "base_model_name_or_path": base}

    def _places(self, model: Any, names: list[str]) -> list[Tensor]:
        """Return the parameters of these names, also if an embedding was wrapped."""
        inner = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
        rows = [module.rows for module in model.modules() if isinstance(module, TokenRows)]
        return [*(inner[name] for name in names), *rows]

    def _refuse_both(self, model: Any, names: list[str]) -> None:
        """Raise `recipe-conflict` if a weight would train as a whole and by single rows."""
        if not self.token_ids:
            return
        both = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
        parameters = dict(model.named_parameters())
        twice = [name for name in names if any(parameters[name] is weight for weight in both)]
        if twice:
            problem, remedy = "it trains as a whole already", "Leave token_ids out, or the embedding and the head."
            raise LuthierError("recipe-conflict", problem, where="token_ids", found=twice[0], remedy=remedy)

    def _named(self) -> dict[str, nn.Parameter]:
        """Return every trained parameter once, by its path in the model."""
        assert self.model is not None, "the adapter is not attached"
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _role(self, name: str) -> Role:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, (nn.Embedding, EmbeddingRows)):
            return "embedding"
        if owner is self.model.get_output_embeddings():
            return "head"
        if name.endswith("bias"):
            return "bias"
        return "norm" if is_norm(owner) else "hidden"
