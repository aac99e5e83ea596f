"""Work of a part over batches, outside of training: inside `Step`, without gradient, on every rank alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from luthier.data.batches.batch import Batch, make_idle_batch
from luthier.distributed.broadcast import exchange_trees
from luthier.errors import LuthierError
from luthier.randomness import seed_all
from luthier.step.preparation import LOSS, decide_with
from luthier.step.setup import Setup


def begin_loss(setup: Setup) -> None:
    """Let the loss prepare itself: on a fresh start, once per task, before the first step."""
    seed_all(setup.recipe.seed)
    setup.tell_progress()
    context, over = setup.context, functools.partial(run_over, setup)
    decide = decide_with(setup.decisions, context.purpose, LOSS)
    setup.loss.begin(attrs.evolve(context, over=over, decide=decide))


def run_over(setup: Setup, batches: Iterable[Batch], function: Callable[[Any, Batch], Any]) -> list[Any]:
    """Return `function(policy, batch)` for each batch, in their order, on every rank; dropout is off.

    Collective: each rank has the same batches, runs its share of them, and as often as every other. A result is a tree
    of mappings, lists, tensors and JSON values.
    """
    own, world = list(batches), setup.world
    if len({*world.gather(len(own))}) > 1:
        problem = "context.over was given another number of batches on another rank"
        raise LuthierError("part-invalid", problem, where="loss", remedy="Give the same batches on every rank.")
    training = setup.model.training
    setup.model.eval()
    try:
        with torch.no_grad():
            turns = range(0, len(own), world.size)
            return [result for first in turns for result in _run_turn(setup, own, first, function)]
    finally:
        setup.model.train(training)


def _run_turn(setup: Setup, own: Sequence[Batch], first: int, function: Callable[[Any, Batch], Any]) -> list[Any]:
    """Run the function over one batch on each rank, and return the results of the ranks that had one."""
    place, count = first + setup.world.rank, min(setup.world.size, len(own) - first)
    works = place < len(own)
    batch = own[place] if works else make_idle_batch(setup.feed.head(1)[0]).to(setup.device)
    seed_all(setup.recipe.seed, 0, place)
    result = setup.step(batch, function)
    results = exchange_trees(setup.world, result if works else None)[:count]
    return [_placed(result, setup.device) for result in results]


def _placed(tree: Any, device: torch.device) -> Any:
    """Return a tree with its tensors on the device, without gradient."""
    if isinstance(tree, dict):
        return {name: _placed(value, device) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_placed(value, device) for value in tree]
    return tree.detach().to(device) if isinstance(tree, Tensor) else tree
