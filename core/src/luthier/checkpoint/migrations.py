"""Migrations: the state tree of a checkpoint that an earlier luthier wrote, in today's layout.

Format 1 (luthier 0.1): {adapter, optimizer, parts: {loss, quantizer, each callback}, tally}.
Format 2: the callbacks stand apart, so that one may have any name; the optimizer says what it keeps on the CPU; the
manifest has a digest of its own, and CRC-32 of the files where it had BLAKE2b.
Format 3: each step that is not logged yet has its terms as (sum, weight).
Format 4: the tally says how many samples a step took as the run began, which earlier ones took throughout, and of how
many steps the schedule took no notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from luthier.checkpoint.format import FORMAT

Tree = dict[str, Any]
SAMPLES: Final = 4  # the first format whose tally stores its batch size


def migrate_tree(tree: Tree, version: int, batch: Any = None) -> Tree:
    """Return the tree of a checkpoint of format `version` as format `FORMAT` has it; `batch` is that of its run, if
    known.
    """
    for number in range(version, FORMAT):
        tree = MIGRATIONS[number](tree)
    if version < SAMPLES and "tally" in tree and isinstance(batch, int):
        tree = {**tree, "tally": {**tree["tally"], "batch": batch}}
    return tree


def _apart(tree: Tree) -> Tree:
    """1 to 2."""
    parts = tree["parts"]
    callbacks = {name: state for name, state in parts.items() if name not in ("loss", "quantizer")}
    states = {name: state for name, state in parts.items() if name in ("loss", "quantizer")}
    state = tree["optimizer"]["state"]
    counters = {i: [n for n, v in slot.items() if isinstance(v, Tensor) and not v.dim()] for i, slot in state.items()}
    return {**tree, "parts": states, "callbacks": callbacks, "optimizer": {**tree["optimizer"], "host": counters}}


def _with_terms(tree: Tree) -> Tree:
    """2 to 3: earlier steps are averaged by their supervised tokens, as they were."""
    if "recent" not in tree:
        return tree
    return {**tree, "recent": [_weighted(step) for step in tree["recent"]]}


def _weighted(step: Tree) -> Tree:
    tokens = float(step["supervised_tokens"])
    return {**step, "terms": {"loss": [step["loss"] * tokens, tokens]}}


def _as_it_is(tree: Tree) -> Tree:
    """3 to 4: what the tally lacks has defaults."""
    return tree


MIGRATIONS: Final[dict[int, Callable[[Tree], Tree]]] = {1: _apart, 2: _with_terms, 3: _as_it_is}
