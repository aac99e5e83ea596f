"""Contents: what a checkpoint holds of a run, and how it goes back.

`adapter` and `optimizer` are the weights that train and what steps them; `parts` has each other object of the `Setup`
with `state()` and `load_state(state)`, by its name there: the loss, the quantizer, a loss scaler; `callbacks` have
theirs under their names; the loop adds its own. The schedule's position and every random state follow from the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.logs import get_logger
from luthier.state_tree import optimizer_state, restore_optimizer

if TYPE_CHECKING:
    from luthier.step.setup import Setup

log = get_logger()
ELSEWHERE: Final = (
    "adapter",
    "optimizer",
    "feed",
    "constant_owners",
)  # a feed's state is that after a step, which the loop knows


def collect_state(setup: Setup, callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """The state tree of everything but the loop."""
    return {
        "adapter": setup.adapter.state(),
        "optimizer": optimizer_state(setup.optimizer),
        "parts": {name: part.state() for name, part in stateful(setup).items()},
        "callbacks": {name: callback.state() for name, callback in callbacks.items() if hasattr(callback, "state")},
    }


def restore_state(
    setup: Setup, callbacks: Mapping[str, Any], tree: Mapping[str, Any], fresh: frozenset[str] = frozenset()
) -> None:
    """Put back what `collect_state` gave; parts in `fresh`, and those it knows nothing of, begin anew."""
    restore_weights(setup, tree, fresh)
    _give(callbacks, tree["callbacks"], frozenset())


def restore_weights(setup: Setup, tree: Mapping[str, Any], fresh: frozenset[str] = frozenset()) -> None:
    """All that decides what the model computes: an optimizer may hold the weights that are evaluated."""
    setup.adapter.load_state(tree["adapter"])
    if "optimizer" not in fresh:
        restore_optimizer(setup.optimizer, tree["optimizer"], settings="optimizer_settings" not in fresh)
    _give(stateful(setup), tree["parts"], fresh)


def _give(known: Mapping[str, Any], held: Mapping[str, Any], fresh: frozenset[str]) -> None:
    for name, part in known.items():
        if name in held and name not in fresh:
            part.load_state(held[name])
    unused = sorted(held.keys() - known.keys())
    if unused:
        log.info("state of the checkpoint that nothing here takes", names=unused)


def stateful(setup: Setup) -> dict[str, Any]:
    """The objects of a `Setup` that have a state of their own, by name."""
    names = [field.name for field in attrs.fields(type(setup)) if field.name not in ELSEWHERE]
    parts = {name: getattr(setup, name) for name in names}
    return {name: part for name, part in parts.items() if callable(getattr(part, "state", None))}
