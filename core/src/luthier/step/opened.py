"""Opening what was trained: a run, an adapter's folder, a merged model, or a hub name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError, refuse_newer
from luthier.model import attention, load
from luthier.model.weights.quantized import QUANTIZED, apply_quantizer, find_trained, read_quantized
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Context, Progress
from luthier.plugins.registry import installed_plugins
from luthier.plugins.structure import structure_value
from luthier.recipe.artifact_note import EXPORTED, NOTE, NOTE_FORMAT, RECORD
from luthier.recipe.schema import Model
from luthier.runs.writing.decisions import Decisions
from luthier.runs.writing.record import read_record
from luthier.step.adapter_start import check_opened_base, read_adapter
from luthier.step.context import ContextSources, attach_adapter, context_for

OPTIONAL: Final[dict[str, Any]] = {
    "files": {},
    "seed": 0,
    "progress": None,
    "decisions": {},
    "chat_template_kwargs": {},
    "stop_tokens": [],
    "card": {},
}  # entries that older notes do not have


@attrs.frozen(kw_only=True, eq=False)
class Opened:
    """A model ready to generate; `adapter` and `quantizer` are None for a plain model. `note` is what lay beside it."""

    model: Any
    tokenizer: Any
    adapter: Any = None
    quantizer: Any = None
    note: dict[str, Any] = attrs.field(factory=dict)


def open_artifact(path: str | Path, device: torch.device | str = "cpu", base: str | None = None) -> Opened:
    """Return the model at `path`. `base` replaces the base model that an adapter's folder names."""
    folder = artifact_folder(Path(path))
    note = read_opened_note(folder)
    if note.get("artifact") == "adapter":
        return _adapted(folder, note, torch.device(device), base)
    if note.get("artifact") == QUANTIZED:
        return _quantized(folder, note, torch.device(device))
    if (folder / "adapter_config.json").is_file():
        remedy = "Give the run's folder, or load it with peft."
        raise LuthierError("artifact-not-found", f"an adapter without {NOTE}", where=str(folder), remedy=remedy)
    _refuse_export(folder)
    spec = Model(name_or_path=str(folder) if folder.is_dir() else str(path))
    model = load.load_model(spec, torch.device(device), {})
    return Opened(model=model.eval(), tokenizer=load.tokenizer_of(spec), note=note)


def _refuse_export(folder: Path) -> None:
    """Raise `artifact-not-found` for a folder that holds a model for other programs alone, and name its run."""
    kinds = [kind for name, kind in EXPORTED.items() if any(folder.glob(name))]
    if kinds and not any(folder.glob("*.safetensors")):
        made_of_run = (folder.absolute().parent / RECORD).is_file()
        remedy = f"Open the run: {folder.parent}." if made_of_run else "Give the run or model that it was made of."
        problem = f"this is an export for other programs, as {kinds[0].upper()}"
        raise LuthierError("artifact-not-found", problem, where=str(folder), remedy=remedy)


def artifact_folder(path: Path) -> Path:
    """Return the folder of a run's artifact; any other path as it is."""
    return path if read_record(path) is None else _of_run(path)


def read_opened_note(folder: Path) -> dict[str, Any]:
    """Return what lies beside an artifact; nothing for a folder that Luthier has not written."""
    return _note(folder / NOTE) if (folder / NOTE).is_file() else {}


def _of_run(folder: Path) -> Path:
    for name in ("adapter", "model", "merged"):
        if (folder / name).is_dir():
            return folder / name
    remedy = "Finish it with the command that began it."
    raise LuthierError("artifact-not-found", "the run has no artifact yet", where=str(folder), remedy=remedy)


def names_everything(note: Mapping[str, Any]) -> bool:
    """Return True if a note names everything that opening needs, so that nothing comes from an object in Python."""
    parts = all("name" in note[kind] for kind in ("quantizer", "adapter"))
    return parts and not note["model"]["name_or_path"].startswith("python:")


def open_adapter(folder: Path, note: Mapping[str, Any], device: torch.device) -> Opened:
    """Return a fresh base with a fresh adapter that has read its files; see `names_everything`."""
    return _adapted(folder, {**OPTIONAL, **note}, device, None)


def _adapted(folder: Path, note: dict[str, Any], device: torch.device, base: str | None) -> Opened:
    spec = structure_value(note["model"], Model, str(folder / NOTE))
    if base is not None:
        spec = attrs.evolve(spec, name_or_path=base)
    check_opened_base(folder, note, spec.name_or_path, named=base is not None)
    return _on_base(folder, note, spec, device)


def open_on_base(folder: Path, spec: Model, quantizer: dict[str, Any], device: torch.device) -> Opened:
    """Return an adapter's folder opened on this base model in this quantizer's form, whatever its note names."""
    return _on_base(folder, {**_adapter_note(folder), "quantizer": quantizer}, spec, device)


def open_fresh(note: dict[str, Any], device: torch.device, base: str | None, where: str) -> Opened:
    """Return the base that a note names with its quantizer and a fresh adapter, for weights that are still to come."""
    spec = structure_value(note["model"], Model, where)
    spec = spec if base is None else attrs.evolve(spec, name_or_path=base)
    opened = _attached(note, spec, device)
    return attrs.evolve(opened, tokenizer=load.tokenizer_of(spec))


def _on_base(folder: Path, note: dict[str, Any], spec: Model, device: torch.device) -> Opened:
    opened = _attached(note, spec, device)
    read_adapter(opened.adapter, folder)
    _tell(opened.quantizer, note)
    return attrs.evolve(opened, tokenizer=load.tokenizer_at(str(folder)))


def _attached(note: dict[str, Any], spec: Model, device: torch.device) -> Opened:
    """Return the base with a fresh adapter; its tokenizer is still to be read."""
    model, quantizer = open_base(note, spec, device)
    return attach_fresh(model, quantizer, note, spec)


def open_base(note: dict[str, Any], spec: Model, device: torch.device) -> tuple[Any, Quantizer]:
    """Return the base model that a note's adapter is to be attached to, in its quantizer's form, and the quantizer."""
    quantizer = _part("quantizer", note["quantizer"])
    trained = find_trained(spec.name_or_path)
    if trained is not None:
        model = read_trained(trained, note, device, quantizer)[0]
    else:
        model = load.load_model(spec, device, quantizer.load_arguments())
        model = apply_quantizer(quantizer, model, _context(model, quantizer, spec, note), progress_of(note))
    attention.install_attention(model)
    return model, quantizer


def attach_fresh(model: Any, quantizer: Quantizer, note: dict[str, Any], spec: Model) -> Opened:
    """Return a base with the adapter that a note names, whose weights are still to be read."""
    adapter = _part("adapter", note["adapter"])
    model = attach_adapter(adapter, model, _context(model, quantizer, spec, note))
    return Opened(model=model.eval(), tokenizer=None, adapter=adapter, quantizer=quantizer, note=note)


def attach_folder(
    model: Any, quantizer: Quantizer, folder: Path, spec: Model, prepare: Callable[[Any], None] = lambda adapter: None
) -> Opened:
    """Return a base with the adapter of a folder attached and read; `spec` is what the base was loaded from.

    `prepare` is called with the adapter before its files are read.
    """
    opened = attach_fresh(model, quantizer, _adapter_note(folder), spec)
    prepare(opened.adapter)
    read_adapter(opened.adapter, folder)
    return opened


def _adapter_note(folder: Path) -> dict[str, Any]:
    note = read_opened_note(folder)
    if note.get("artifact") != "adapter":
        problem, remedy = f"there is no adapter with its note, {NOTE}, here", "Give a run's folder, or its adapter's."
        raise LuthierError("artifact-not-found", problem, where=str(folder), remedy=remedy)
    return note


def _quantized(folder: Path, note: dict[str, Any], device: torch.device) -> Opened:
    model, quantizer = read_trained(folder, note, device)
    tokenizer = load.tokenizer_at(str(folder))
    return Opened(model=model.eval(), tokenizer=tokenizer, quantizer=quantizer, note=note)


def read_trained(
    folder: Path, note: dict[str, Any], device: torch.device, live: Quantizer | None = None
) -> tuple[Any, Quantizer]:
    """Return the model that a quantizer has written, and the quantizer: one of its own, or `live` where none can be.

    `note` says which quantizer that is, and how many steps it was trained.
    """
    quantizer = live if "name" not in note["quantizer"] and live is not None else _part("quantizer", note["quantizer"])
    model = load.empty_model(folder, device)
    sources = ContextSources(purpose="open", seed=note.get("seed", 0), original=_absent)
    context = context_for(model, quantizer, sources)
    empty = attrs.evolve(context, has_values=False)
    model = read_quantized(quantizer, folder, apply_quantizer(quantizer, model, empty, progress_of(note)))
    _tell(quantizer, note)
    return model, quantizer


def progress_of(note: dict[str, Any]) -> Progress | None:
    """Return how far the run of an artifact was when it was written; None where its note does not say."""
    return Progress(**note["progress"]) if note.get("progress") else None


def _tell(quantizer: Quantizer, note: dict[str, Any]) -> None:
    progress = progress_of(note)
    if progress is not None:
        quantizer.progressed(progress)


def _context(model: Any, quantizer: Quantizer, spec: Model, note: dict[str, Any]) -> Context:
    return context_for(
        model,
        quantizer,
        ContextSources(
            purpose="open",
            seed=note.get("seed", 0),
            decisions=Decisions(note.get("decisions")),
            original=lambda layer: load.original_weight(spec.name_or_path, model, layer),
        ),
    )


def _absent(layer: nn.Module) -> Tensor:
    raise LuthierError("model-not-found", "the base model is not at hand where a trained one is read", where="original")


def _note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text("utf-8"))
        refuse_newer(note, NOTE_FORMAT, path)
        needed = ("model", "adapter", "quantizer", "artifact", "prompts", "run_id", "parts")
        return {**OPTIONAL, **note, **{key: note[key] for key in needed}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"damaged: {type(error).__name__}: {error}"
        raise LuthierError("file-damaged", problem, where=str(path)) from None


def _part(kind: str, spec: dict[str, Any]) -> Any:
    plugins = installed_plugins()
    offer = plugins.get(kind, spec["name"])
    options = structure_value({k: v for k, v in spec.items() if k != "name"}, plugins.options(offer), kind)
    return plugins.build(offer, options)
