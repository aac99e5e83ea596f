"""Predicted bytes of a run's files: its checkpoints, constants and artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from luthier.artifacts.dense_copy import plain_skeleton
from luthier.artifacts.save import artifact_name
from luthier.checkpoint.saver import Cadence
from luthier.model.weights.dense_files import Files

if TYPE_CHECKING:
    from luthier.step.setup import Setup


def predict_disk(setup: Setup, optimizer_bytes: int, num_tasks: int) -> dict[str, int]:
    """Return the predicted bytes of a run's files by kind, and their total.

    `optimizer_bytes` are those of the optimizer's state in memory. One of several tasks leaves its state for the next.
    Tokenizer, log and metrics are not counted. Of a run without a known end one checkpoint is counted.
    """
    adapter = setup.adapter
    state, constants = state_bytes(adapter.state()), state_bytes(adapter.constants())
    sizes = {
        "checkpoints": count_checkpoints(setup) * (state + optimizer_bytes),
        "constants": constants,
        "task state": state + constants if num_tasks > 1 else 0,
        "artifact": _artifact_bytes(setup),
        "merged": _merged_bytes(setup) if setup.recipe.merge else 0,
    }
    return {**sizes, "total": sum(sizes.values())}


def count_checkpoints(setup: Setup) -> int:
    """Return how many checkpoints a run keeps at its end. An evaluation that asks for one more is not counted."""
    recipe, steps = setup.recipe, setup.feed.total
    if steps is None:
        return 1
    cadence, epoch = Cadence.of(recipe), setup.feed.steps_per_epoch
    batch, count = recipe.global_batch_size, 0
    for step in range(1, steps + 1):
        ends = bool(epoch) and step % (epoch or 1) == 0
        count += cadence.due(step=step, samples=step * batch, seen=batch, epoch_ended=ends, last=step == steps)
    return count if recipe.save_total_limit is None else min(count, recipe.save_total_limit)


def state_bytes(tree: Any) -> int:
    """Return the bytes of the tensors in a state tree, shared ones once."""
    found: dict[int, int] = {}
    _collect_sizes(tree, found)
    return sum(found.values())


def _collect_sizes(tree: Any, found: dict[int, int]) -> None:
    if isinstance(tree, torch.Tensor):
        found[id(tree)] = tree.numel() * tree.element_size()
    elif isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            _collect_sizes(value, found)


def _artifact_bytes(setup: Setup) -> int:
    if artifact_name(setup.adapter) == "model":
        return _dense_bytes(setup)
    return sum(p.numel() * p.element_size() for group in setup.adapter.groups() for p in group.parameters)


def _merged_bytes(setup: Setup) -> int:
    """Return the bytes of the merged model's files: all of its layers are dense, also those that are quantized here."""
    dtype = _file_dtype(setup) or setup.model.dtype
    return sum(p.numel() for p in plain_skeleton(setup.model).parameters()) * dtype.itemsize


def _file_dtype(setup: Setup) -> torch.dtype | None:
    """Return the dtype of a dense model's files; None: that of each weight."""
    wish = getattr(setup.adapter, "save_dtype", None)
    return Files.of_recipe(setup.recipe, setup.context.dtype, wish).dtype


def _dense_bytes(setup: Setup) -> int:
    """Return the bytes of the whole model's files, without what the adapter has put beside its weights."""
    dtype = _file_dtype(setup)
    beside = {id(p) for group in setup.adapter.groups() if group.role == "adapter" for p in group.parameters}
    weights = [p for p in setup.model.parameters() if id(p) not in beside]
    return sum(p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in weights)
