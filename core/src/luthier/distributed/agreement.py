"""Agreement at the end of a step: what one rank was asked, by a callback, a signal or a file, is asked of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from luthier.distributed.world import World

if TYPE_CHECKING:
    from luthier.runs.writing.active_run import ActiveRun


@attrs.frozen(kw_only=True)
class Agreed:
    """What every rank does next; a request or signal that comes later waits for the end of the next step."""

    stop: str | None = None
    save: bool = False
    evaluation: bool = False
    signal: int | None = None

    @property
    def ends(self) -> bool:
        """Whether this was the run's last step, for now or for good."""
        return self.stop is not None or self.signal is not None


def agree_requests(run: ActiveRun, world: World) -> Agreed:
    """Collective. The reason of the lowest rank that has one is everyone's; so are a checkpoint and an evaluation."""
    mine = [run.stop_reason, run.wants_save, run.wants_evaluation, run.signal]
    reasons, saves, evaluations, signals = zip(*world.gather(mine), strict=True)
    agreed = Agreed(stop=_first(reasons), save=any(saves), evaluation=any(evaluations), signal=_first(signals))
    run.stop_reason, run.wants_save, run.wants_evaluation = agreed.stop, agreed.save, agreed.evaluation
    return agreed


def _first(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if value is not None), None)


def local_callbacks(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Those callbacks that run on ranks other than the main one: they say so by `every_rank = True`."""
    return {name: callback for name, callback in callbacks.items() if getattr(callback, "every_rank", False)}
