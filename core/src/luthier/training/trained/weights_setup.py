"""A run's model, loss and held-out rows put together again, with the weights of a place in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.checkpoint import run_state
from luthier.checkpoint.constants import read_constants
from luthier.data.examples import TokenDataset
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.plugins.contracts.protocols import Loss
from luthier.plugins.contracts.values import Progress
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.recipe.parts import LISTS
from luthier.recipe.reading.draft import default_of
from luthier.recipe.schema import Data, Source
from luthier.runs.writing.decisions import Decisions
from luthier.step.adapter_start import read_adapter
from luthier.step.fit_checks import check_fit, check_room
from luthier.step.opened import artifact_folder, read_opened_note
from luthier.step.setup import Setup
from luthier.training.assemble import assemble_run
from luthier.training.trained.open_weights import note_of, read_tree
from luthier.training.trained.weights_place import WeightsPlace, run_recipe

log = get_logger()
# settings that decide the weights, and not how they are measured
WEIGHTS: Final = ("model", "adapter", "adapter_from", "quantizer", "optimizer")


@attrs.frozen(kw_only=True, eq=False)
class Weights:
    """A recipe that attaches the weights of a place, and what is read into it. `note` tells how far it was trained."""

    place: WeightsPlace
    recipe: Recipe
    note: dict[str, Any]
    tree: dict[str, Any] | None = None  # the state of a checkpoint

    @classmethod
    def of_place(cls, place: WeightsPlace, data: str | None) -> Weights:
        """Return those of a run with its recipe; of an artifact or a model alone, with a recipe of its own."""
        if place.run is None:
            return cls._alone(place, data)
        recipe = run_recipe(place.run)
        if place.checkpoint is None:
            return cls(place=place, recipe=recipe, note=read_opened_note(Path(place.artifact)))
        tree = read_tree(place.checkpoint)
        return cls(place=place, recipe=recipe, note=note_of(place, tree), tree=tree)

    @classmethod
    def _alone(cls, place: WeightsPlace, data: str | None) -> Weights:
        if data is None:
            problem, remedy = "there is no run here, which would have rows of its own", "Give a file with --data."
            raise LuthierError("run-not-found", problem, where=place.artifact, remedy=remedy)
        note = read_opened_note(artifact_folder(Path(place.artifact)))
        parts: dict[str, Any] = {"model": place.artifact, "adapter": "full"}
        if note.get("artifact") == "adapter":
            parts = {name: note[name] for name in ("model", "adapter", "quantizer")}
        elif "quantizer" in note and note["artifact"] != "model":
            parts["quantizer"] = note["quantizer"]
        return cls(place=place, recipe=Recipe.from_dict({**parts, "data": data}), note=note)

    @property
    def is_read(self) -> bool:
        """Return True where weights are read into the assembled model; a model alone is its own base."""
        return self.place.run is not None or self.note.get("artifact") == "adapter"


def measured_recipe(weights: Weights, changes: dict[str, Any], data: str | None) -> Recipe:
    """Return the recipe of an evaluation: `data` in the place of its rows, and nothing that belongs to training."""
    lists = {name: _loadable(name, changes.get(name, getattr(weights.recipe, name))) for name in LISTS}
    changed = changes | lists
    if not lists["metrics"] and weights.recipe.metrics:  # nothing is left that the run's own limit is about
        changed.setdefault("max_eval_answers", default_of("max_eval_answers"))
    recipe = attrs.evolve(weights.recipe, memory_check=False, reference_cache=False, teacher_cache=False,
                          callbacks=[], **changed)  # fmt: skip
    if data is not None:
        return attrs.evolve(recipe, data=held_out_data(recipe.data, data), max_eval_batches=None, eval_steps=None,
                            eval_on_start=False, load_best_model_at_end=False)  # fmt: skip
    if not recipe.data.validation:
        raise LuthierError("data-empty", "the run has no validation rows", where="data.validation",
                           remedy="Give a file with --data.")  # fmt: skip
    return recipe


def _loadable(name: str, entries: list[Any]) -> list[Any]:
    """Return the metrics or penalties without those that were objects in Python, which no file can bring back.

    A penalty takes no part in an evaluation; of a metric that is left out the log says so.
    """
    lost = [entry["local"] for entry in entries if isinstance(entry, Mapping) and "local" in entry]
    if lost and name == "metrics":
        log.warning("metrics that were objects in Python are left out: give them again", metrics=lost)
    return [entry for entry in entries if not (isinstance(entry, Mapping) and "local" in entry)]


def held_out_data(data: Data, path: str) -> Data:
    """Return the settings of rows at a path, their columns mapped as the run's one source has it."""
    source, like = Source(path=path), data.train[0] if len(data.train) == 1 else None
    if like is not None:
        source = attrs.evolve(source, columns=like.columns, template=like.template)
    return attrs.evolve(data, train=[source], validation=0.0, streaming=False)


def set_up_weights(weights: Weights, recipe: Recipe, *, separate: bool) -> tuple[Setup, TokenDataset]:
    """Return the model with its weights and the rows to measure: the recipe's own where they are `separate` from those
    that the run was trained on, else its validation rows."""
    decisions = Decisions(weights.place.record.get("decisions"), is_logged=False)
    setup = assemble_run(recipe, Objects(), decisions=decisions, purpose="open").setup
    setup.undo.close()
    if weights.is_read:
        _read_weights(setup, weights)
    progress = weights.note.get("progress")
    setup.tell_progress(Progress(**progress) if progress else None)
    setup.model.set_attn_implementation(setup.attention)
    rows = setup.train if separate else setup.validation
    assert isinstance(rows, TokenDataset)
    check_fit(rows, setup.tokenizer, setup.model)
    check_room(rows, setup.recipe.data, setup.recipe.max_tokens_per_device, setup.layout)
    return setup, rows


def _read_weights(setup: Setup, weights: Weights) -> None:
    place, tree = weights.place, weights.tree
    if tree is None:
        read_adapter(setup.adapter, artifact_folder(Path(place.artifact)))
        return
    for name, file in tree.get("constants", {}).items():
        if name in setup.constant_owners:
            setup.constant_owners[name].load_constants(read_constants(place.run or Path(), file))
    same = setup.recipe.loss == weights.recipe.loss
    left = frozenset() if same or getattr(setup.loss.load_state, "__func__", None) is Loss.load_state else {"loss"}
    run_state.restore_weights(setup.adapter, setup.optimizer, setup.stateful_parts, tree, frozenset(left))
