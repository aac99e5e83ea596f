"""The driver of a run with several workers: `python -m luthier_ray.train_driver PLAN RECIPE --json`, within a Ray job.

It lets Ray Train start the workers, and says how rank 0's process ended: its document on standard output, its status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

from luthier_ray.train_worker import RANKS, STOP, train_rank
from luthier_ray.worker_plan import WorkerPlan, read_plan

STOPPED: Final = 128 + signal.SIGTERM
LOST: Final = "distributed-lost"  # the code of a process that only reports the end of another one
TAIL: Final = 2000  # characters of standard error


def drive_workers(plan: WorkerPlan, recipe: Path) -> bool:
    """Train with the workers of the plan. Return False if Ray Train gave up."""
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    place = recipe.parent
    ray.init(log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: (place / STOP).touch())  # after Ray, which sets its own
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={"name": plan.name, "recipe": str(recipe)},
        torch_config=TorchConfig(backend="gloo"),  # of the workers; the run's own processes choose theirs
        scaling_config=_scaling_of(plan),
        run_config=RunConfig(
            name=plan.name,
            storage_path=str(place / "ray-train"),
            failure_config=FailureConfig(max_failures=plan.max_restarts),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        print(f"Ray Train: {error}", file=sys.stderr)
        return False
    finally:
        ray.shutdown()
    return True


def _scaling_of(plan: WorkerPlan) -> Any:
    from ray.train import ScalingConfig

    wanted: Any = plan.wanted  # Ray's public class still has the type of its older one
    return ScalingConfig(
        num_workers=wanted,
        use_gpu=plan.resources.get("GPU", 0) > 0,
        resources_per_worker=plan.resources or None,
    )


def read_ending(place: Path) -> str:
    """Return what explains the run's end: the first error that is not about another process, else rank 0's document.

    Without any it is an empty text, and the end of a process's standard error is printed to ours.
    """
    documents = [path.read_text("utf-8", "replace").strip() for path in sorted((place / RANKS).glob("*.out"))]
    for text in documents:
        try:
            error = json.loads(text)["error"]
        except (ValueError, KeyError, TypeError):
            continue
        if error.get("code") != LOST:
            return text
    whole = next((text for text in documents if text), "")
    if not whole:
        for path in sorted((place / RANKS).glob("*.err")):
            print(path.read_text("utf-8", "replace")[-TAIL:], file=sys.stderr)
    return whole


def main(words: list[str]) -> int:
    plan, recipe = read_plan(words[0]), Path(words[1])
    told = os.dup(1)
    os.dup2(2, 1)  # Ray prints to standard output, which is for the document
    succeeded = drive_workers(plan, recipe)
    with os.fdopen(told, "w") as output:
        print(read_ending(recipe.parent), file=output)
    if (recipe.parent / STOP).exists():
        return STOPPED
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
