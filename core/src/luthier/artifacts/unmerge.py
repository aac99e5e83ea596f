"""Unmerging: an adapter's update is removed from a merged model, if the update does not depend on the base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.artifacts.dense_copy import DenseCopy, make_dense
from luthier.artifacts.folders import check_replaceable, write_artifact
from luthier.artifacts.note import derive_note
from luthier.artifacts.save import portable_model
from luthier.artifacts.verify import check_model
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.load import load_model, tokenizer_of
from luthier.model.weights import fingerprint
from luthier.model.weights.dense_files import Files, base_dtype, save_model
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.structure import structure_value
from luthier.recipe.artifact_note import RECORD, read_note
from luthier.recipe.schema import Model
from luthier.step.opened import attach_folder, open_on_base

log = get_logger()
DENSE: Final = {"name": "none"}  # the spec of the quantizer of a merged model, and of the adapter of a base
MERGED: Final = "merged"  # the folder of a run that holds its merged model
NOISE: Final = 0.1  # relative size of noise on a weight, added to see if the update depends on the weight
ADDS: Final = 1e-4  # error of a float32 sum, relative to the weights


def unmerge_folder(merged: Path, adapter: Path, folder: Path, save_dtype: torch.dtype | None = None) -> Path:
    """Write the base of a merged model, without the update of the adapter that was merged into it.

    It is exact up to the rounding of the merged files. If the base that the adapter names is available here, its own
    weights are written, bit for bit, after a check that they agree. Raises `artifact-unmergeable` if the adapter does
    more than add to weights, so that what it replaced is lost, and `artifact-mismatch` if another adapter was merged.
    """
    check_replaceable(folder)
    spec = Model(name_or_path=str(_find_merged(merged)))
    opened = open_on_base(adapter, spec, DENSE, torch.device("cpu"))
    own = base_dtype(spec, opened.model.dtype)  # of the files, whatever dtype they were loaded in
    dense = make_dense(opened.model, opened.adapter, opened.quantizer)
    updates, note = _subtract(dense), read_note(adapter)
    if not updates:
        raise LuthierError("artifact-unmergeable", "this adapter adds to no weight", where=str(adapter))
    _check_adding(dense, updates, opened.quantizer, adapter)
    came = _take_base(dense, updates, note, own)
    dtype = save_dtype or came or own
    dense.round_weights(dtype)
    unmerge_note = {"adapter": str(adapter), "run": note.get("run_id"), "bit_exact": came == dtype}

    def write(aside: Path) -> None:
        with portable_model(dense.model):
            save_model(dense.model, aside, Files(dtype=dtype))
        tokenizer_of(spec).save_pretrained(aside)
        check_model(dense.model.to(dtype), aside)

    made = write_artifact(folder, write, _base_note(note, unmerge_note))
    log.info("unmerged", folder=str(made), **unmerge_note)
    return made


def _find_merged(place: Path) -> Path:
    """Return the folder of the merged model: of a run's folder the one that `luthier merge` made in it.

    Raises `artifact-not-found` for a run without one, and for an adapter.
    """
    if (place / RECORD).is_file():
        if (place / MERGED).is_dir():
            return place / MERGED
        remedy = f"Give the folder that the adapter was merged into; `luthier merge {place}` makes one."
        raise LuthierError("artifact-not-found", "the run has no merged model", where=str(place), remedy=remedy)
    if read_note(place).get("artifact") == "adapter" or (place / "adapter_config.json").is_file():
        problem, remedy = "this is an adapter, not a merged model", "Give the merged model first, then the adapter."
        raise LuthierError("artifact-not-found", problem, where=str(place), remedy=remedy)
    return place


def _base_note(note: Mapping[str, Any], unmerge_note: dict[str, Any]) -> dict[str, Any]:
    """Return a base's note, made from an adapter's: nothing was trained, so it is prompted like any other model."""
    untrained: dict[str, Any] = {"progress": None, "decisions": {}, "prompts": "chat", "chat_template_hash": None,
                 "chat_template_kwargs": {}, "stop_tokens": [], "parts": []}  # fmt: skip
    return {
        **derive_note(note),
        **untrained,
        "adapter": DENSE,
        "quantizer": DENSE,
        "artifact": "model",
        "unmerge": unmerge_note,
    }


@torch.no_grad()
def _subtract(dense: DenseCopy) -> dict[str, Tensor]:
    """Replace the weights of a copy, which contain the update twice, by those without it; return the updates."""
    updates = {}
    for path, live in dense.changed.items():
        parameter = _parameter(dense.model, path)
        weight = dense.weigh(path, live)  # the merged weight
        weight = weight.T if parameter.shape != weight.shape else weight
        updates[path] = parameter.data - weight
        parameter.data = weight - updates[path]
    return updates


@torch.no_grad()
def _check_adding(dense: DenseCopy, updates: dict[str, Tensor], quantizer: Quantizer, adapter: Path) -> None:
    """Raise `artifact-unmergeable` unless the adapter adds the same to any base, tested by noise on the base."""
    base = copy.deepcopy(dense.model).float()
    noise = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        drawn = torch.randn(parameter.shape, generator=noise).to(parameter.device)
        parameter.add_(NOISE * parameter.square().mean().sqrt() * drawn)
    expected = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    for path, update in updates.items():
        expected[f"{path}.weight"] += update
    noisy = attach_folder(base, quantizer, adapter, Model(name_or_path=str(adapter)))
    dense_noisy = make_dense(noisy.model, noisy.adapter, quantizer).model
    for name, parameter in dense_noisy.named_parameters():
        error = (parameter - expected[name]).norm() if name in expected else torch.inf
        if not error <= ADDS * parameter.norm():
            problem = "the adapter does more than add to this weight, so that what it replaced is lost"
            raise LuthierError("artifact-unmergeable", problem, where=name, remedy="Use the base model itself.")


@torch.no_grad()
def _take_base(
    dense: DenseCopy, updates: dict[str, Tensor], note: dict[str, Any], rounded: torch.dtype
) -> torch.dtype | None:
    """Put the base's own weights in place, if the base that the adapter names is available here and unchanged.

    `rounded` is the dtype of the merged files, whose rounding is allowed for. Returns the dtype of the base's files,
    or None if the base is not available.
    """
    name = note.get("model", {}).get("name_or_path", "python:")
    is_here = name == "demo" or Path(name).expanduser().is_dir()
    if not is_here or note.get("quantizer") != DENSE or fingerprint.of_model(name) != note.get("base"):
        return None
    spec = structure_value(note["model"], Model, "model")
    base = load_model(spec, torch.device("cpu"), {})
    changes = {f"{path}.weight": update for path, update in updates.items()}
    for name, ours in dense.model.named_parameters():
        theirs = base.get_parameter(name)
        changed = theirs.float().norm() + (changes[name].norm() if name in changes else 0.0)
        allowed = torch.finfo(rounded).eps / 2 * theirs.float().norm() + ADDS * changed
        if not (ours - theirs).norm() <= allowed:
            problem = "this weight without the adapter is not the base's: another was merged, or it was trained since"
            raise LuthierError("artifact-mismatch", problem, where=name, remedy="Give the adapter that was merged.")
        ours.data = theirs.data
    return base_dtype(spec, base.dtype)


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    layer: Any = model.get_submodule(path)
    return layer.weight
