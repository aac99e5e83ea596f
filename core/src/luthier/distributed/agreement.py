"""Agreement at the end of a step: what one rank was asked, by a callback, a signal or a file, is asked of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.distributed.world import World

if TYPE_CHECKING:
    from luthier.runs.writing.run_control import RunControl


def agree_requests(control: RunControl, world: World) -> None:
    """Make what any rank was asked the same on all of them: the first reason and signal in their order count.

    This is a collective.
    """
    mine = [control.stop_reason, control.wants_save, control.wants_evaluation, control.signal]
    reasons, saves, evaluations, signals = zip(*world.gather(mine), strict=True)
    control.agree(_first(reasons), saves=any(saves), evaluates=any(evaluations), signal=_first(signals))


def _first(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if value is not None), None)


def local_callbacks(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the callbacks that run on ranks other than the main one: they have `every_rank = True`."""
    return {name: callback for name, callback in callbacks.items() if getattr(callback, "every_rank", False)}
