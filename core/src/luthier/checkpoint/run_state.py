"""Contents: what a checkpoint holds of a run, and how it goes back.

`adapter` and `optimizer` are the weights that train and what steps them; `parts` has each other object of the run with
`state()` and `load_state(state)`, by its name: the loss, the quantizer, a loss scaler; `callbacks` have theirs under
their names; the loop adds its own. The schedule's position and every random state follow from the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.logs import get_logger
from luthier.state_tree import optimizer_state, restore_optimizer

if TYPE_CHECKING:
    import torch

    from luthier.plugins.contracts.protocols import Adapter

log = get_logger()


def collect_state(
    adapter: Adapter, optimizer: torch.optim.Optimizer, parts: Mapping[str, Any], callbacks: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state tree of everything but the loop; `parts` are `Setup.stateful_parts`."""
    return {
        "adapter": adapter.state(),
        "optimizer": optimizer_state(optimizer),
        "parts": {name: part.state() for name, part in parts.items()},
        "callbacks": {name: callback.state() for name, callback in callbacks.items() if hasattr(callback, "state")},
    }


def restore_state(
    adapter: Adapter, optimizer: torch.optim.Optimizer, parts: Mapping[str, Any], callbacks: Mapping[str, Any],
    tree: Mapping[str, Any], fresh: frozenset[str] = frozenset(),
) -> None:  # fmt: skip
    """Put back what `collect_state` gave; parts in `fresh`, and those that it does not know, begin from the start."""
    restore_weights(adapter, optimizer, parts, tree, fresh)
    _give(callbacks, tree["callbacks"], frozenset())


def restore_weights(
    adapter: Adapter, optimizer: torch.optim.Optimizer, parts: Mapping[str, Any], tree: Mapping[str, Any],
    fresh: frozenset[str] = frozenset(),
) -> None:  # fmt: skip
    """Put back all that decides what the model computes: an optimizer may hold the weights that are evaluated."""
    adapter.load_state(tree["adapter"])
    if "optimizer" not in fresh:
        restore_optimizer(optimizer, tree["optimizer"], settings="optimizer_settings" not in fresh)
    _give(parts, tree["parts"], fresh)


def _give(known: Mapping[str, Any], states: Mapping[str, Any], fresh: frozenset[str]) -> None:
    for name, part in known.items():
        if name in states and name not in fresh:
            part.load_state(states[name])
    unused = sorted(states.keys() - known.keys())
    if unused:
        log.info("state of the checkpoint that nothing here takes", names=unused)
