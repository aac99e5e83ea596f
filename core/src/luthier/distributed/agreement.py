"""Agreement at the end of a step: what a callback, a signal or a file has asked of one rank is asked of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.distributed.world import World

if TYPE_CHECKING:
    from luthier.runs.writing.run_control import RunControl


def agree_requests(control: RunControl, world: World) -> None:
    """Make the requests equal on all ranks. The first reason and the first signal, in the order of ranks, count.

    This is a collective.
    """
    mine = [control.stop_reason, control.wants_save, control.wants_evaluation, control.signal]
    reasons, saves, evaluations, signals = zip(*world.gather(mine), strict=True)
    control.agree(_first(reasons), saves=any(saves), evaluates=any(evaluations), signal=_first(signals))


def _first(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if value is not None), None)


def local_callbacks(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the callbacks that run on ranks other than the main one: those with `every_rank = True`."""
    return {name: callback for name, callback in callbacks.items() if getattr(callback, "every_rank", False)}
