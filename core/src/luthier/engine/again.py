"""A finished run, read again from its folder: its numbers, and its model with its data where they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from luthier.engine.assemble import Objects, assemble
from luthier.engine.attention import packed
from luthier.engine.evaluate import evaluate
from luthier.engine.result import Run
from luthier.engine.run import RECIPE, read_record
from luthier.engine.setup import Setup
from luthier.errors import LuthierError
from luthier.recipe import Recipe

PATHS = ("output_path", "artifact", "merged", "best_checkpoint")


def finished(folder: Path) -> Run:
    """The result that a completed run recorded."""
    record = read_record(folder)
    if record is None or "result" not in record:
        raise LuthierError("run-not-found", "no finished run here", where=str(folder))
    held = {name: Path(v) if name in PATHS and v else v for name, v in record["result"].items()}
    return Run(**held)


def reopened(folder: Path) -> Setup:
    """Model, adapter and data as they were at the run's end."""
    setup = assemble(Recipe.load(folder / RECIPE, environ={}), Objects()).setup
    setup.adapter.load(finished(folder).artifact)
    return setup


def evaluate_again(setup: Setup, data: Any = None) -> dict[str, float]:
    """The held-out numbers over the run's validation rows, or over `data`: a path, rows or a dataset."""
    if data is None:
        if setup.validation is None:
            raise LuthierError("data-empty", "the run has no validation rows", where="data.validation",
                               remedy="Give evaluate(data) some.")  # fmt: skip
        with packed(setup.model):
            return evaluate(setup)
    from luthier.data.prepare import prepare

    spec, given = data_spec(data)
    wanted = attrs.evolve(setup.recipe.data, train=spec, validation=0.0) if spec else setup.recipe.data
    prepared = prepare(attrs.evolve(wanted, validation=0.0), setup.tokenizer, seed=setup.recipe.seed, given=given)
    with packed(setup.model):
        return evaluate(setup, prepared.train)


def data_spec(data: Any) -> tuple[list[Any] | None, Any]:
    """(sources, rows): one of the two is None, by whether `data` is named or handed over."""
    from luthier.recipe.tree import Source

    if isinstance(data, (str, Path)):
        return [Source(path=str(data))], None
    if isinstance(data, Source):
        return [data], None
    return None, data
