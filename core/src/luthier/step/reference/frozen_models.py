"""Frozen models: the teacher, or a reference of its own, read once and never trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from luthier.errors import LuthierError
from luthier.model import attention, load
from luthier.model import self_check as probe
from luthier.model.model_config import build_model, config_of
from luthier.model.weights.quantized import QUANTIZED, apply_quantizer
from luthier.plugins.structure import structure_value
from luthier.recipe.artifact_note import find_artifact, read_note
from luthier.recipe.parts import find_part, to_plain
from luthier.recipe.schema import Model, OtherModel
from luthier.step.context import WHOLE, ContextSources, attach_adapter, context_for
from luthier.step.opened import open_on_base, read_trained

if TYPE_CHECKING:
    from luthier.plugins.contracts.protocols import Quantizer
    from luthier.plugins.contracts.values import Purpose
    from luthier.plugins.registry import Plugins
    from luthier.recipe import Recipe


@attrs.frozen(kw_only=True)
class FrozenModel:
    """Where a frozen model comes from: its base, its quantizer as plain data, and a trained adapter's folder.

    `note` is the adapter's, or that of a model that was trained in its quantizer's form.
    """

    model: Model
    quantizer: dict[str, Any]
    adapter: Path | None = None
    note: dict[str, Any] = attrs.field(factory=dict)


def find_frozen(spec: OtherModel, role: str, plugins: Plugins) -> FrozenModel:
    """Return what a teacher or reference names; a run or an adapter in the model's place brings its base along."""
    asked = to_plain(spec.quantizer, "quantizer", f"{role}.quantizer", plugins)
    folder = find_artifact(spec.model.name_or_path) if spec.model.name_or_path != "demo" else None
    if folder is None and spec.adapter is None:
        return FrozenModel(model=spec.model, quantizer=asked)
    if spec.adapter is not None:
        adapter = find_artifact(spec.adapter)
        note = {} if adapter is None else read_note(adapter)
        if adapter is None or note.get("artifact") != "adapter":
            problem = "no adapter of Luthier's is there"
            raise LuthierError("artifact-not-found", problem, where=f"{role}.adapter", found=spec.adapter)
        return FrozenModel(model=spec.model, quantizer=asked, adapter=adapter, note=note)
    assert folder is not None  # without a folder it has an adapter, or there is no other model
    note = read_note(folder)
    given = note.get("quantizer", asked) if spec.quantizer == "none" else asked
    if note.get("artifact") == "adapter":
        base = structure_value({**note["model"], "dtype": spec.model.dtype}, Model, f"{role}.model")
        return FrozenModel(model=base, quantizer=given, adapter=folder, note=note)
    model = attrs.evolve(spec.model, name_or_path=str(folder))
    trained = note.get("artifact") == QUANTIZED
    return FrozenModel(model=model, quantizer=given if trained else asked, note=note if trained else {})


def read_frozen(frozen: FrozenModel, recipe: Recipe, device: torch.device, purpose: Purpose, plugins: Plugins) -> Any:
    """Return the model on its device, ready to be asked; in a plan its shapes alone."""
    if purpose == "plan":
        model = _shapes(frozen, device, plugins)
    elif frozen.adapter is not None:
        model = open_on_base(frozen.adapter, frozen.model, frozen.quantizer, device).model
    elif frozen.note:
        model = read_trained(Path(frozen.model.name_or_path), frozen.note, device)[0]
    else:
        quantizer = _built("quantizer", frozen.quantizer, plugins)
        model = load.load_model(frozen.model, device, quantizer.load_arguments())
        model = apply_quantizer(quantizer, model, _context(model, quantizer, "open"))
    attention.install_attention(model)
    model.requires_grad_(False).eval()
    if purpose != "plan":
        probe.check_architecture(model, packing=recipe.packing)
    return model


def check_same_tokens(frozen: FrozenModel, role: str, tokenizer: Any, model_config: Any, *, aligns: bool) -> None:
    """Raise `recipe-conflict` for a model with other tokens than the one that trains, unless the loss `aligns`."""
    if aligns:
        return
    config = config_of(frozen.model).get_text_config()
    sizes = config.vocab_size, model_config.get_text_config().vocab_size
    theirs = load.tokenizer_of(frozen.model)
    if sizes[0] != sizes[1]:
        problem = f"its head has {sizes[0]:,} columns, and the model's {sizes[1]:,}"
    elif theirs.get_vocab() != tokenizer.get_vocab():
        problem = "its tokenizer has other tokens than the model's"
    else:
        return
    remedy = "Choose one of the same family, or a loss that aligns vocabularies."
    raise LuthierError(
        "recipe-conflict", problem, where=f"{role}.model", found=frozen.model.name_or_path, remedy=remedy
    )


def _shapes(frozen: FrozenModel, device: torch.device, plugins: Plugins) -> Any:
    """Return the model without its weights."""
    quantizer = _built("quantizer", frozen.quantizer, plugins)
    model = build_model(config_of(frozen.model), frozen.model, device)
    model = apply_quantizer(quantizer, model, _context(model, quantizer, "plan"))
    if frozen.adapter is None:
        return model
    adapter = _built("adapter", frozen.note["adapter"], plugins)
    return attach_adapter(adapter, model, _context(model, quantizer, "plan"))


def _built(kind: str, plain: dict[str, Any], plugins: Plugins) -> Any:
    part = find_part(plain, kind, kind, plugins)
    return plugins.build(part.offer, part.options) if part.offer else part.local


def _context(model: Any, quantizer: Quantizer, purpose: Purpose) -> Any:
    def original(layer: Any) -> Any:
        raise LuthierError("model-not-found", "a frozen model keeps no original weights", where="original")

    assert purpose in (*WHOLE, "plan")
    return context_for(model, quantizer, ContextSources(seed=0, purpose=purpose, original=original))
