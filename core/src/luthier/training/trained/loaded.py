"""Loaded models: a base held once, and any number of its adapters over it, each ready to answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from luthier.artifacts.folders import same_base
from luthier.errors import LuthierError
from luthier.model.generation.generate import PromptForm, Sampling, generate_text, prompt_messages
from luthier.model.load import tokenizer_at
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.structure import structure_value
from luthier.recipe.artifact_note import read_note
from luthier.recipe.schema import Model
from luthier.step.opened import Opened, artifact_folder, attach_folder, open_artifact, open_base, read_opened_note


@attrs.frozen(kw_only=True, eq=False)
class HeldBase:
    """A base model without adapter, whose weights every adapter over it shares."""

    model: Any = attrs.field(repr=False)
    quantizer: Quantizer = attrs.field(repr=False)
    spec: Model
    note: dict[str, Any] = attrs.field(repr=False)  # the note of the adapter that the model was loaded for


@attrs.frozen(kw_only=True, eq=False)
class Loaded:
    """A model that answers. Several over one base are alive at once, and a switch between them costs nothing."""

    path: Path
    _opened: Opened = attrs.field(repr=False, alias="opened")
    _base: HeldBase | None = attrs.field(default=None, repr=False, alias="base")

    @property
    def model(self) -> Any:
        return self._opened.model

    @property
    def tokenizer(self) -> Any:
        return self._opened.tokenizer

    def generate(
        self, prompt: str | Sequence[Mapping[str, Any]], *, system: str | None = None, max_new_tokens: int = 128,
        temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
    ) -> str:  # fmt: skip
        """Return the answer to a text or to messages, prompted as the adapter was trained; greedy at temperature 0."""
        opened, form = self._opened, PromptForm.of_note(self._opened.note)
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        asked = prompt_messages(prompt, system)
        return generate_text(
            opened.model, opened.tokenizer, asked, adapter=opened.adapter, form=form, sampling=sampling
        )

    def with_adapter(self, path: str | Path) -> Loaded:
        """Return the same base under another adapter, of a run or a folder; this one stays as it is.

        Base weights are shared, not copied; what an adapter trains in place is its own. Raises `artifact-mismatch`
        where that adapter has another base or quantizer, and `artifact-unmergeable` where this is no base with an
        adapter.
        """
        if self._base is None:
            remedy = "Load an adapter first."
            raise LuthierError("artifact-unmergeable", "this is a whole model", where=str(self.path), remedy=remedy)
        return _over(self._base, artifact_folder(Path(path)))

    def disabled(self) -> AbstractContextManager[None]:
        """Let the model answer as its base does within this context."""
        adapter = self._opened.adapter
        return nullcontext() if adapter is None else adapter.disabled()


def load_artifact(path: str | Path, device: torch.device) -> Loaded:
    """Return what lies at a path: a base with its adapter, or a whole model."""
    folder = artifact_folder(Path(path))
    note = read_opened_note(folder)
    if note.get("artifact") != "adapter":
        return Loaded(path=folder, opened=open_artifact(path, device))
    spec = structure_value(note["model"], Model, str(folder))
    model, quantizer = open_base(note, spec, device)
    return _over(HeldBase(model=model, quantizer=quantizer, spec=spec, note=read_note(folder)), folder)


def _over(base: HeldBase, folder: Path) -> Loaded:
    """Return a copy of the base that shares its weights, with the adapter of a folder attached."""
    note = read_note(folder)
    if note and (not same_base(base.note, note) or note.get("quantizer") != base.note.get("quantizer")):
        remedy = "Load it by itself, with luthier.load."
        raise LuthierError("artifact-mismatch", "the adapter has another base or quantizer", where=str(folder),
                           found=note["model"]["name_or_path"], remedy=remedy)  # fmt: skip
    opened = attach_folder(share_weights(base.model), base.quantizer, folder, base.spec, prepare=_unshare)
    tokenizer = tokenizer_at(str(folder))
    return Loaded(path=folder, opened=attrs.evolve(opened, tokenizer=tokenizer), base=base)


def share_weights(model: nn.Module) -> Any:
    """Return a copy of a model whose parameters and buffers have the memory of the model's own."""
    memo: dict[int, Any] = {id(p): _sharing(p) for p in model.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _sharing(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _unshare(adapter: Any) -> None:
    """Give what an adapter trains memory of its own, before its files are read into it."""
    for group in adapter.groups():
        for parameter in group.parameters:
            own: Tensor = parameter.data.clone()
            parameter.data = own
