"""A finished run, read again from its folder: its numbers, and its model with its data where they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from luthier.artifacts.note import of_run
from luthier.checkpoint import folder as checkpoint
from luthier.data.examples import TokenDataset
from luthier.data.formats.wanted import Wanted
from luthier.errors import LuthierError
from luthier.model.attention import packed_attention
from luthier.model.operations.install_operations import installed_operations
from luthier.plugins.contracts.protocols import Loss
from luthier.plugins.structure import structure_value
from luthier.recipe import Recipe, resolve_parts
from luthier.recipe.objects import Objects
from luthier.recipe.schema import Data, Source
from luthier.runs.recorded_result import recorded_result
from luthier.runs.writing.decisions import Decisions
from luthier.runs.writing.record import RECIPE, read_record
from luthier.step.adapter_start import read_adapter
from luthier.step.evaluation.evaluate import evaluate_loss
from luthier.step.fit_checks import check_fit, check_room
from luthier.step.opened import progress_of
from luthier.step.setup import Setup
from luthier.training.assemble import assemble_run


def reopen_run(folder: Path, given: tuple[Recipe, Objects] | None) -> Setup:
    """Model, adapter and data as they were at the run's end."""
    recipe, objects = given or (Recipe.load(folder / RECIPE, environ={}), Objects())
    decisions = Decisions((read_record(folder) or {}).get("decisions"))
    setup = assemble_run(recipe, objects, decisions=decisions, purpose="open").setup
    setup.undo.close()
    result = recorded_result(folder)
    read_adapter(setup.adapter, result["artifact"])
    _restore_loss(setup, folder, result["best_checkpoint"] if recipe.load_best_model_at_end else None)
    setup.progress = progress_of(of_run(folder)) or setup.progress
    setup.tell_progress()
    setup.model.set_attn_implementation(setup.attention)
    return setup


def _restore_loss(setup: Setup, folder: Path, best: Path | None) -> None:
    """Give a loss that keeps a state the one that it had at the end of its run, or in the best checkpoint."""
    if getattr(setup.loss.load_state, "__func__", None) is Loss.load_state:
        return
    newest = checkpoint.newest_checkpoint(folder) if best is None else (best, checkpoint.load_checkpoint(best), [])
    if newest is not None and "loss" in newest[1]["parts"]:
        setup.loss.load_state(newest[1]["parts"]["loss"])


def evaluate_again(setup: Setup, data: Any = None) -> dict[str, float]:
    """Return the held-out numbers over the run's validation rows, or over `data`: a path, rows or a dataset."""
    if data is None:
        if setup.validation is None:
            raise LuthierError("data-empty", "the run has no validation rows", where="data.validation",
                               remedy="Give evaluate(data) some.")  # fmt: skip
        return evaluate_rows(setup, setup.validation)
    from luthier.data.prepare import prepare_data

    held_out = attrs.evolve(setup.recipe.data, validation=0.0, streaming=False)
    source = _source(data, held_out)
    held_out = held_out if source is None else attrs.evolve(held_out, train=[source])
    wanted, given = Wanted.of_part(resolve_parts(setup.recipe).loss), data if source is None else None
    rows = prepare_data(held_out, setup.tokenizer, seed=setup.recipe.seed, wanted=wanted, given=given).train
    assert isinstance(rows, TokenDataset)  # not a stream
    check_fit(rows, setup.tokenizer, setup.model)
    check_room(rows, setup.recipe.data, setup.recipe.max_tokens_per_device, setup.layout)
    return evaluate_rows(setup, rows)


def evaluate_rows(setup: Setup, rows: Any) -> dict[str, float]:
    """Return the held-out numbers over examples that are made already, computed as in the run."""
    with as_trained(setup):
        return evaluate_loss(setup, rows)


@contextmanager
def as_trained(setup: Setup) -> Iterator[None]:
    """Let the model compute within this context as it did in the run."""
    trained = [p for group in setup.adapter.groups() for p in group.parameters]
    operations = installed_operations(setup.model, setup.operations.operations)
    precision, process = setup.precision.held(setup.model, trained), setup.process.applied()
    with packed_attention(setup.model), operations, precision, process:
        yield


def _source(data: Any, like: Data) -> Source | None:
    """Return the source of named rows, with the columns of the run's one source; None for rows themselves."""
    if isinstance(data, Mapping) and "path" in data:
        return structure_value(data, Source, "data")
    if isinstance(data, (str, Path)):
        (first, *others) = like.train
        if others:
            return Source(path=str(data))
        return Source(path=str(data), columns=first.columns, template=first.template)
    return data if isinstance(data, Source) else None
