"""The files sent to the machine that will train: the recipe with that machine's paths, its rows, and the launch."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

import attrs

from luthier.plugins.providing.job_records import JobSpec
from luthier.recipe import Recipe
from luthier.recipe.schema import Data, Source

LAUNCH = "launch.json"
RECIPE = "recipe.yaml"
TRAIN = ("-m", "luthier", "train")


def pack_job(
    job: JobSpec,
    place: str,
    processes: str | None = None,
    *,
    recipe: Recipe | None = None,
    run: str | None = None,
    command: Sequence[str] = TRAIN,
) -> dict[str, Path]:
    """Write a job's parcel, and return its files by their names in `place`, the absolute folder on the other machine.

    Rows in files of this machine go with it; names of hub data sets and of models stay as they are. `processes` is
    torchrun's `--nproc-per-node`; `recipe` is the job's recipe if it has been read already; `run` is the run's folder
    if it is not inside `place`; `command` are the arguments of Python before the recipe's path.
    """
    run = run or f"{place}/run"
    parcel, files = job.folder / "parcel", dict[str, Path]()
    parcel.mkdir(exist_ok=True)
    recipe = recipe or Recipe.load(job.folder / RECIPE, environ={})
    moved = _move_data(recipe.data, place, files)
    attrs.evolve(recipe, data=moved, output_dir=run).write(parcel / RECIPE)
    words = [*command, f"{place}/{RECIPE}", "--json"]
    words += [] if processes is None else ["--nproc-per-node", processes]
    (parcel / LAUNCH).write_text(json.dumps({"arguments": words, "run": run}), "utf-8")
    return {RECIPE: parcel / RECIPE, LAUNCH: parcel / LAUNCH, **files}


def _move_data(data: Data, place: str, files: dict[str, Path]) -> Data:
    """Return the recipe's data with the other machine's paths; add the files to `files`."""

    def move_each(sources: Sequence[Source]) -> list[Source]:
        return [there for source in sources for there in _move_source(source, place, files)]

    train, validation = move_each(data.train), data.validation
    return attrs.evolve(
        data, train=train, validation=move_each(validation) if isinstance(validation, list) else validation
    )


def _move_source(source: Source, place: str, files: dict[str, Path]) -> list[Source]:
    """Return the source with the other machine's paths, a pattern as its files; add these to `files`."""
    paths = [Path(name) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
    if not paths:
        return [source]
    moved = []
    for path in paths:
        name = f"data/{len(files)}-{path.name}"
        files[name] = path
        moved.append(attrs.evolve(source, path=f"{place}/{name}"))
    return moved
