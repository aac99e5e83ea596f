"""The parts `bitfit` and `modules`: some parameters of the model train in place, and the rest is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from luthier import (
    PEFT_CONFIG,
    Adapter,
    Context,
    EmbeddingRows,
    Group,
    LuthierError,
    TokenRows,
    check_token_rows,
    fill_tensors,
    get_logger,
    place_token_rows,
)
from torch import Tensor, nn

from luthier_selective import BitFit, Modules, files, row_files
from luthier_selective.choosing import choose_parameters, is_norm

Role = Literal["hidden", "embedding", "head", "norm", "bias", "adapter"]


class SelectiveAdapter(Adapter):
    """An adapter that trains parameters in place. It provides no reference, so the run keeps the initial weights."""

    def __init__(self, options: BitFit | Modules) -> None:
        self.options = options
        self.token_ids = (options.token_ids or []) if isinstance(options, Modules) else []
        self.model: Any = None
        self.rows: dict[str, TokenRows] = {}

    def attach(self, model: Any, context: Context) -> Any:
        """Unfreeze what the options name, and freeze the rest. Everything is checked before anything changes."""
        names = choose_parameters(model, self.options)
        self._refuse_both(model, names)
        if self.token_ids:
            check_token_rows(model, self.token_ids, where="token_ids", own_head=True)
            self.rows = place_token_rows(model, self.token_ids, own_head=True)
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
        fill_tensors(self.state(), state, "adapter state", "checkpoint-corrupt")

    def save(self, folder: Path) -> None:
        """Write what trains alone: rows of tokens as PEFT has them, other parameters by their names in the model."""
        if self._has_peft_layout():
            row_files.save_rows(Path(folder), self._base_name(), self.token_ids, self.rows)
        else:
            files.save_tensors(Path(folder), self._describe(), self.state())

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, or rows of tokens that PEFT wrote. An error changes nothing."""
        if (Path(folder) / PEFT_CONFIG).is_file():
            row_files.load_rows(Path(folder), self.model, self.token_ids, self.rows if self._has_rows_alone() else {})
        else:
            tensors = files.load_tensors(Path(folder), self._describe())
            fill_tensors(self.state(), tensors, str(Path(folder) / files.WEIGHTS), "artifact-mismatch")

    def merge(self, context: Context) -> Any:
        """Return the plain model. Raises `artifact-unmergeable` for NaN, or if it is merged already."""
        if self.model is None:
            problem = "no adapter is attached, or it is merged already"
            raise LuthierError("artifact-unmergeable", problem, remedy="Attach it to a fresh base model.")
        for name, parameter in self._named().items():
            if not parameter.isfinite().all():
                raise LuthierError("artifact-unmergeable", "the adapter holds NaN or infinity", where=name)
        model, self.model = self.model, None
        for path, module in self.rows.items():
            model.set_submodule(path, module.write_rows())
        self.rows = {}
        return model.requires_grad_(False)

    def _describe(self) -> dict[str, Any]:
        method = "bitfit" if isinstance(self.options, BitFit) else "modules"
        return {"method": method, "token_ids": self.token_ids, "base_model_name_or_path": self._base_name()}

    def _base_name(self) -> str | None:
        return getattr(self.model.config, "_name_or_path", None) or None

    def _has_rows_alone(self) -> bool:
        return bool(self.rows) and all(name.endswith(".rows") for name in self._named())

    def _has_peft_layout(self) -> bool:
        """Return True if PEFT computes the same from the rows alone. Its head with rows of its own drops the bias."""
        heads = [one for one in self.rows.values() if not isinstance(one, EmbeddingRows)]
        return self._has_rows_alone() and all(getattr(head.base_layer, "bias", None) is None for head in heads)

    def _places(self, model: Any, names: list[str]) -> list[Tensor]:
        """Return the parameters of these names, also if an embedding was wrapped."""
        inner = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
        return [*(inner[name] for name in names), *(module.rows for module in self.rows.values())]

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
