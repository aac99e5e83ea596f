"""Overfitting one batch: whether a run's model, data and loss can learn at all, tried before the run, apart from it."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.data.batches.example_feed import Portion
from luthier.disk import write_json
from luthier.health.causes import list_causes
from luthier.health.flow import Flow, FlowMeter
from luthier.health.reach import Reach
from luthier.health.trace import trace_step
from luthier.health.watch import Remark
from luthier.logs import get_logger, run_log
from luthier.model.dropout import set_rates
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe, recipe_hash
from luthier.recipe.objects import Objects
from luthier.runs.metrics_file import FILE as METRICS
from luthier.runs.metrics_file import write_line
from luthier.runs.picture import PICTURE, draw_picture
from luthier.runs.run_folder import free_folder
from luthier.runs.writing.lock import locked_folder
from luthier.runs.writing.record import RECIPE, new_id, record_environment, strict_json, write_record
from luthier.runs.writing.target import default_folder
from luthier.step.over_batches import begin_loss
from luthier.step.setup import Setup
from luthier.step.start_weights import begin_penalties
from luthier.step.update import update_weights
from luthier.timestamp import current_time
from luthier.training.assemble import Assembled, assemble_run
from luthier.training.loop import trace_target

log = get_logger()
STEPS: Final = 100
FALL: Final = 0.5  # the share of its first value that the loss must fall to
FLOW: Final = 10  # the step whose gradient flow is reported: an adapter that begins at zero has moved by then
ENOUGH: Final = 0.02  # the share of its first value at which the test ends early
REPORT: Final = "overfit.json"


@attrs.frozen(kw_only=True)
class Overfit:
    """The result of the test. `causes` lists what to check, the likeliest first; it is empty if the test passed."""

    passed: bool
    first_loss: float
    last_loss: float
    least_loss: float
    threshold: float  # the share of the first loss that the smallest loss must fall below
    steps: int
    losses: list[float] = attrs.field(repr=False)
    rows: list[str] = attrs.field(repr=False)
    tokens: int
    supervised_tokens: int
    learning_rate: float
    causes: list[str]
    flow: list[Flow] = attrs.field(repr=False)  # of the tenth step, or the last
    output_path: Path
    duration_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        values = attrs.asdict(self, recurse=False)
        return {**values, "flow": [flow.to_dict() for flow in self.flow], "output_path": str(self.output_path)}


@attrs.define
class Seen:
    """The observations of the test's steps."""

    losses: list[float] = attrs.field(factory=list)
    remarks: list[Remark] = attrs.field(factory=list)
    flow: list[Flow] = attrs.field(factory=list)
    norm: float = 0.0
    broken: str | None = None  # the reason why a step was not finite


def overfit_first_batch(recipe: Recipe, objects: Objects, steps: int = STEPS) -> Overfit:
    """Train `steps` steps on the first global batch alone, and judge.

    The learning rate is the recipe's peak, without schedule; there is no dropout and no weight decay, no evaluation, no
    callback and no checkpoint. The folder is one of its own, and a model that was handed over is copied.
    """
    folder = free_folder(_folder(recipe))
    if objects.model is not None:
        objects = attrs.evolve(objects, model=copy.deepcopy(objects.model), eval_data=None)
    with keep_randomness():
        assembled = assemble_run(plain(recipe, steps, folder), objects)
        setup = assembled.setup
        try:
            set_rates(setup.model, 0.0)
            setup.decays = [0.0] * len(setup.decays)
            record = _record(recipe, assembled)
            with locked_folder(folder), run_log(record["run_id"], folder / "log.jsonl"):
                return _recorded(setup, folder, record, steps)
        finally:
            setup.undo.close()


def plain(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """Return the recipe without settings that would hide whether the model learns."""
    quiet: dict[str, Any] = {
        **{"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0, "warmup_ratio": 0.0},
        **{"training_mode": "step", "max_steps": steps, "max_tokens": None, "num_train_epochs": 1.0},
        **{"eval_steps": None, "eval_on_start": False, "max_eval_batches": None, "load_best_model_at_end": False},
        **{"save_strategy": "no", "save_steps": None, "save_samples": None, "merge": False, "callbacks": []},
        **{"data": attrs.evolve(recipe.data, validation=0.0), "output_dir": str(folder)},
    }
    return attrs.evolve(recipe, **quiet)


def _folder(recipe: Recipe) -> Path:
    folder = Path(recipe.output_dir) if recipe.output_dir else default_folder(recipe)
    return folder.with_name(f"{folder.name}-overfit")


def _record(recipe: Recipe, assembled: Assembled) -> dict[str, Any]:
    return {
        "run_id": new_id(),
        "purpose": "overfit-one-batch",
        "created": current_time(),
        "recipe_hash": recipe_hash(recipe),
        "seed": recipe.seed,
        "data": assembled.prepared.train.fingerprint,
        "parts": [part.describe() for part in assembled.resolved],
        "note": {"model": recipe.to_dict()["model"]},
        **record_environment(str(assembled.setup.device)),
    }


def _recorded(setup: Setup, folder: Path, record: dict[str, Any], steps: int) -> Overfit:
    setup.recipe.write(folder / RECIPE)
    write_record(folder, record, state="running", total_steps=steps)
    log.info("overfitting one batch", folder=str(folder), steps=steps)
    portion = next(iter(setup.feed.portions(0)))
    began = time.perf_counter()
    try:
        seen = _train(setup, portion, steps, folder)
        verdict = _judged(setup, portion, seen, folder, time.perf_counter() - began)
    except BaseException as error:
        write_record(folder, record, state="failed", error=str(error))
        raise
    state = "completed" if verdict.passed else "failed"
    health = {"remarks": [remark.to_dict() for remark in seen.remarks]}
    cause = None if verdict.passed else verdict.causes[0]
    result = {"final_loss": verdict.last_loss}
    write_record(folder, record, state=state, step=verdict.steps, result=result, error=cause,
                 decisions=setup.decisions.to_dict(), health=health)  # fmt: skip
    write_json(folder / REPORT, strict_json(verdict.to_dict()))
    if len(seen.losses) > 1:
        draw_picture({"loss": list(enumerate(seen.losses, 1))}, folder / PICTURE, title="one batch", smoothing=0.0)
    return verdict


def _train(setup: Setup, portion: Portion, steps: int, folder: Path) -> Seen:
    """Take steps until the batch is learnt by heart or a number is not finite."""
    seen, reach = Seen(), Reach(setup.adapter)
    setup.adapter.begin_task(0, 1)
    begin_penalties(setup)
    begin_loss(setup)
    reach.begin()
    for index in range(steps):
        meter = FlowMeter(setup.adapter) if index + 1 == min(FLOW, steps) else None
        done = update_weights(setup, index, portion)
        seen.losses.append(done.loss)
        seen.norm = done.grad_norm
        write_line(folder / METRICS, index + 1, {"loss": done.loss, "grad_norm": done.grad_norm})
        if done.overflowed:  # float16's loss scale is found in the first steps
            continue
        if not done.finite:
            seen.broken = trace_step(trace_target(setup), index, done.batches).told
            break
        seen.remarks += reach.see(index + 1, done.learning_rate)
        seen.flow = meter.measure(done.grad_norm, setup.recipe.max_grad_norm) if meter else seen.flow
        if seen.flow and abs(done.loss) <= ENOUGH * abs(seen.losses[0]):
            break
    seen.remarks += reach.end(len(seen.losses))
    return seen


def _judged(setup: Setup, portion: Portion, seen: Seen, folder: Path, seconds: float) -> Overfit:
    losses = seen.losses
    finite = [loss for loss in losses if math.isfinite(loss)]
    least = min(finite, default=math.nan)
    fallen = losses[0] - losses[-1]
    passed = seen.broken is None and fallen > 0 and fallen >= (1 - FALL) * abs(losses[0])
    return Overfit(
        passed=passed,
        first_loss=losses[0],
        last_loss=losses[-1],
        least_loss=least,
        threshold=FALL,
        steps=len(losses),
        losses=losses,
        rows=[example.where for example in portion.examples],
        tokens=portion.num_tokens,
        supervised_tokens=portion.num_supervised,
        learning_rate=setup.rates.peak,
        causes=[] if passed else _causes(setup, portion, seen),
        flow=seen.flow,
        output_path=folder,
        duration_seconds=seconds,
    )


def _causes(setup: Setup, portion: Portion, seen: Seen) -> list[str]:
    if seen.broken is not None:
        return [f"step {len(seen.losses)} is not finite: {seen.broken}"]
    return list_causes(setup.rates.peak, portion, seen.losses, seen.remarks, seen.flow, seen.norm)
