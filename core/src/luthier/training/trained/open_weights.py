"""Opening trained weights to generate, merge or export: an artifact, or a checkpoint as the run computes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.checkpoint import folder as checkpoint
from luthier.checkpoint.constants import read_constants
from luthier.checkpoint.shards import load_parts
from luthier.data.tokenise.examples_of_rows import Maker
from luthier.errors import LuthierError
from luthier.model.weights.shard_tensors import has_parts
from luthier.plugins.completion import has_default
from luthier.plugins.contracts.values import Progress
from luthier.recipe import Recipe, resolve_parts
from luthier.state_tree import restore_optimizer
from luthier.step.attach import trained_groups
from luthier.step.opened import Opened, names_everything, open_artifact, open_fresh
from luthier.training.trained.weights_place import WeightsPlace, run_recipe


def open_weights(place: WeightsPlace, device: torch.device | str = "cpu", base: str | None = None) -> Opened:
    """Return the model of a place. `base` stands in for the base model that an adapter names."""
    if place.checkpoint is None or place.run is None:
        return open_artifact(place.artifact, device, base)
    tree = read_tree(place.checkpoint)
    opened = open_fresh(note_of(place, tree), torch.device(device), base, str(place.checkpoint))
    for name, file in tree.get("constants", {}).items():
        if name == "adapter":
            opened.adapter.load_constants(read_constants(place.run, file))
    opened.adapter.load_state(tree["adapter"])
    if "quantizer" in tree["parts"]:
        opened.quantizer.load_state(tree["parts"]["quantizer"])
    opened.quantizer.progressed(Progress(**opened.note["progress"]))
    recipe = run_recipe(place.run)
    _take_evaluated(opened, recipe, tree)
    template = Maker.of(recipe.data, opened.tokenizer).template
    if template is not None:
        opened.tokenizer.chat_template = template.source
    return opened


def read_tree(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's tree, whole, however many ranks have written it."""
    tree = checkpoint.load_checkpoint(folder)
    return load_parts(tree, folder, None) if has_parts(tree) else tree


def note_of(place: WeightsPlace, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the note that an artifact of this checkpoint would have."""
    tally, record = tree["tally"], place.record
    if "note" not in record:
        raise LuthierError("run-not-found", "a checkpoint is opened by the run.json of its run", where=str(place.run))
    progress = {"step": tally["step"], "total_steps": record.get("total_steps"), "epoch": tally["epoch"]}
    note = {**record["note"], "progress": progress, "decisions": record.get("decisions", {}), "artifact": "adapter"}
    if not names_everything(note):
        problem = "its base model or a part was an object in Python, which no file holds"
        raise LuthierError("artifact-not-found", problem, where=str(place.run), remedy="Open it in Python.")
    return note


def _take_evaluated(opened: Opened, recipe: Recipe, tree: dict[str, Any]) -> None:
    """Put in place the weights that the optimizer evaluates with, where those are not the ones that it steps."""
    resolved = resolve_parts(recipe)
    part = resolved.build(resolved.optimizer)
    if has_default(part, "optimizer", "evaluating"):
        return
    optimizer = part.build(trained_groups(recipe, opened.adapter, opened.model))
    restore_optimizer(optimizer, tree["optimizer"])
    part.evaluating().__enter__()  # entered for as long as the model lives
