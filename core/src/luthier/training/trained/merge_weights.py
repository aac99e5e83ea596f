"""Merging trained weights: an adapter of a run, a checkpoint or a folder, folded into its base."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final, Literal, get_args

from luthier.artifacts.folders import check_replaceable
from luthier.artifacts.note import rename_base
from luthier.artifacts.save import MergeBase, is_quantized, save_merged
from luthier.errors import LuthierError, suggest_nearest
from luthier.model.load import original_weight
from luthier.model.weights.dense_files import file_options
from luthier.plugins.structure import structure_value
from luthier.recipe.schema import Model
from luthier.step.opened import Opened
from luthier.training.trained.open_weights import open_weights
from luthier.training.trained.weights_place import WeightsPlace

Onto = Literal["dequantized", "original"]
NO_BASE: Final = "python:"  # the prefix by which a recipe names a model that was an object


def merge_weights(
    place: WeightsPlace, folder: Path | None, *, base: str | None = None, onto: Onto = "dequantized",
    save_dtype: str | None = None, max_shard_size: str | None = None,
) -> Path:  # fmt: skip
    """Write the merged model of a place, whole and verified; see `luthier.merge`."""
    if onto not in get_args(Onto):
        remedy = suggest_nearest(str(onto), get_args(Onto))
        raise LuthierError("recipe-out-of-range", "no base to merge onto", where="onto", found=onto, remedy=remedy)
    files = file_options(save_dtype, max_shard_size)
    folder = folder or place.beside("merged")
    check_replaceable(folder)
    opened = open_weights(place, base=base)
    if opened.adapter is None and opened.quantizer is None:
        remedy = "Give a run's folder, or an adapter's."
        raise LuthierError("artifact-unmergeable", "there is no adapter to merge", where=place.artifact, remedy=remedy)
    note = {**opened.note, "files": {**opened.note.get("files", {}), **files}}
    note |= {} if base is None else rename_base(note, base)
    return save_merged(opened.model, opened.tokenizer, opened.adapter, opened.quantizer, folder, note,
                       _merge_base(opened, base, onto))  # fmt: skip


def _merge_base(opened: Opened, base: str | None, onto: Onto) -> MergeBase | None:
    """Return what the update is put upon, with a reader of the checkpoint, where layers are quantized and frozen."""
    trained = getattr(opened.quantizer, "trains", False)
    stored = getattr(opened.model.config, "quantization_config", None) is not None
    if onto == "original" and (trained or stored):
        problem = "the quantized layers were trained, so that the checkpoint is not their base"
        problem = problem if trained else "the checkpoint is quantized itself, and holds no other weights"
        raise LuthierError("artifact-unmergeable", problem, where="onto", remedy="Leave it out.")
    source = base or structure_value(opened.note["model"], Model, "model").name_or_path
    if trained or stored or source.startswith(NO_BASE) or not is_quantized(opened.model, opened.quantizer):
        return None
    return MergeBase(onto=onto, original=functools.partial(original_weight, source, opened.model))
