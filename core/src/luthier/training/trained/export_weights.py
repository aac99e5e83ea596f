"""Exporting trained weights: an artifact or a checkpoint, handed to an exporter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import attrs

from luthier.artifacts.export import Export, Exportable, export_model, read_config
from luthier.model.model_config import config_of
from luthier.plugins.structure import structure_value
from luthier.recipe.schema import Model
from luthier.training.trained.open_weights import open_weights
from luthier.training.trained.weights_place import WeightsPlace


def export_weights(
    place: WeightsPlace, chosen: Any, folder: Path | None = None, *, base: str | None = None, dry_run: bool = False
) -> Export:
    """Write the model of a place in a format; see `export_model`. `base` stands in for an adapter's own."""
    source = Exportable(
        beside=place.beside,
        read_config=functools.partial(_config, place, base),
        open_model=functools.partial(open_weights, place, base=base),
    )
    return export_model(chosen, source, folder, dry_run=dry_run)


def _config(place: WeightsPlace, base: str | None) -> Any:
    """Return the transformers config, from files alone."""
    if place.checkpoint is None:
        return read_config(Path(place.artifact), base)
    spec = structure_value(place.record["note"]["model"], Model, str(place.run))
    return config_of(spec if base is None else attrs.evolve(spec, name_or_path=base))
