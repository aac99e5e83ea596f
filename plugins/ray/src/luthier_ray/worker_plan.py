"""The plan of a run with several workers: what the provider writes for the driver. Without Ray."""

from __future__ import annotations

import json
from typing import Final

import attrs
from luthier import drop_missing

from luthier_ray import Ray

DRIVER: Final = "luthier_ray.train_driver"


@attrs.frozen(kw_only=True)
class WorkerPlan:
    """The workers of a run: how many, at least how many, what each gets, and how often they may be started again."""

    name: str
    workers: int
    min_workers: int | None
    max_restarts: int
    resources: dict[str, float]  # of each worker, by Ray's names

    @property
    def wanted(self) -> int | tuple[int, int]:
        """Return Ray Train's number of workers: fixed, or the fewest and the most."""
        least = self.min_workers
        return self.workers if least is None or least == self.workers else (least, self.workers)


def describe_workers(name: str, options: Ray) -> str:
    """Return the plan as one word of a command line."""
    resources = drop_missing(CPU=options.cpus, GPU=options.gpus)
    plan = WorkerPlan(name=name, workers=options.workers, min_workers=options.min_workers,
                      max_restarts=options.max_restarts, resources=resources)  # fmt: skip
    return json.dumps(attrs.asdict(plan), sort_keys=True)


def read_plan(text: str) -> WorkerPlan:
    """Return the plan that `describe_workers` wrote."""
    values = json.loads(text)
    return WorkerPlan(
        name=values["name"],
        workers=values["workers"],
        min_workers=values["min_workers"],
        max_restarts=values["max_restarts"],
        resources=values["resources"],
    )
