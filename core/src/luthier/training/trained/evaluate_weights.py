"""Evaluation of trained weights: numbers with intervals over held-out rows, beside others', and a gate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.plugins.contracts.side_protocols import Benchmark
from luthier.plugins.contracts.values import BenchmarkScore
from luthier.recipe import Recipe
from luthier.runs.writing.evaluation_record import record_evaluation
from luthier.step.evaluation.answer_metrics import measure_answers
from luthier.step.evaluation.evaluate import evaluate_loss
from luthier.step.evaluation.scores import Scores
from luthier.step.evaluation.unit_scores import score_units
from luthier.training.best_metric import more_is_better, require_metric
from luthier.training.reopen import as_trained
from luthier.training.trained.benchmark_weights import find_benchmark, run_benchmark
from luthier.training.trained.engine_answers import measure_engine
from luthier.training.trained.weights_place import WeightsPlace
from luthier.training.trained.weights_setup import WEIGHTS, Weights, measured_recipe, set_up_weights

log = get_logger()
PREFIX = "eval_"
NORMAL: Final = 1.96  # standard errors from the middle to the end of a 95 % interval


@attrs.frozen(kw_only=True)
class Measuring:
    """How weights are measured: over the rows at `data` (None: the run's validation rows), with `metrics` added.

    `resamples` are drawn for an interval; 0: none. `gate` is the number that may be worse by `max_regression`.
    With `tasks` of a `benchmark` rows are measured only where `data` is given. With an `engine` nothing but metrics
    over its answers is measured.
    """

    data: str | None = None
    metrics: tuple[str | Mapping[str, Any], ...] = ()
    resamples: int = attrs.field(default=1000, validator=attrs.validators.ge(0))
    max_answers: int | None = None
    max_new_tokens: int | None = None
    device: str | None = None
    gate: str = "eval_loss"
    max_regression: float | None = None
    tasks: tuple[str, ...] = ()
    benchmark: str | Mapping[str, Any] = "lm_eval"
    engine: Any = None

    @property
    def has_rows(self) -> bool:
        """Return True if rows are measured, and not tasks alone."""
        return self.data is not None or not self.tasks


@attrs.frozen(kw_only=True)
class Number:
    """A number of an evaluation with its 95 % interval, or, of a task, its standard error; None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None
    stderr: float | None = None

    @classmethod
    def of_task(cls, value: float, stderr: float | None) -> Number:
        """Return a number of a task, whose interval follows from its standard error."""
        if stderr is None:
            return cls(value=value)
        return cls(value=value, low=value - NORMAL * stderr, high=value + NORMAL * stderr, stderr=stderr)


@attrs.frozen(kw_only=True)
class Gate:
    """How much worse a number is than that of other weights (below 0: better), and the most that is allowed."""

    metric: str
    regression: float
    max_regression: float

    @property
    def passed(self) -> bool:
        return self.regression <= self.max_regression


@attrs.frozen(kw_only=True)
class Evaluation:
    """The numbers of trained weights over `rows` units and over tasks; `against`: the others' numbers.

    `differences` are ours less theirs. `engine` says in words what answered instead of the weights.
    """

    path: str
    step: int | None
    rows: int = 0
    metrics: dict[str, Number] = attrs.field(factory=dict)
    against_path: str | None = None
    against: dict[str, Number] = attrs.field(factory=dict)
    differences: dict[str, Number] = attrs.field(factory=dict)
    gate: Gate | None = None
    engine: str | None = None

    @property
    def passed(self) -> bool:
        return self.gate is None or self.gate.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        plain = attrs.asdict(self)
        if self.gate is not None:
            plain["gate"]["passed"] = self.gate.passed
        return {**plain, "passed": self.passed}


@attrs.frozen(kw_only=True, eq=False)
class Measured:
    """The scores of one model, by number; only those of the loss if it couples the batch."""

    units: int
    scores: dict[str, Scores]
    others: dict[str, float]
    directions: dict[str, bool | None]  # of metric parts: True if higher is better


def evaluate_weights(place: WeightsPlace, how: Measuring, other: WeightsPlace | None = None) -> Evaluation:
    """Measure the weights of a place and, on the same rows by the same loss and on the same tasks, those of another.

    What is measured of a run is also written to its folder.
    """
    if how.max_regression is not None and other is None:
        raise LuthierError("recipe-missing", "a regression is one against other weights", where="--against",
                           remedy="Give a run or a model with --against.")  # fmt: skip
    benchmark = find_benchmark(how.benchmark, how.tasks) if how.tasks else None
    if how.engine is not None:
        evaluation, directions = _evaluate_engine(place, how, other)
    elif how.has_rows:
        evaluation, directions = _evaluate_rows(place, how, other)
    else:
        against = None if other is None else _shown(other)
        evaluation, directions = Evaluation(path=_shown(place), step=place.step, against_path=against), {}
    if benchmark is not None:
        evaluation, of_tasks = _add_tasks(evaluation, benchmark, how, place, other)
        directions = {**directions, **of_tasks}
    if how.max_regression is not None:
        evaluation = attrs.evolve(evaluation, gate=_gate(evaluation, directions, how))
    if place.run is not None:
        record_evaluation(place.run, {"data": how.data, "tasks": list(how.tasks), **evaluation.to_dict()})
    return evaluation


def _evaluate_rows(
    place: WeightsPlace, how: Measuring, other: WeightsPlace | None
) -> tuple[Evaluation, dict[str, bool | None]]:
    """Return the numbers over rows, and of each whether more is better (None: neither is)."""
    weights = Weights.of_place(place, how.data)
    recipe = measured_recipe(weights, _changes(weights.recipe, how), how.data)
    own = _measure(weights, recipe, how)
    evaluation = Evaluation(
        path=_shown(place), step=place.step, rows=own.units, metrics=_numbers(own, recipe.seed, how)
    )
    if other is None:
        return evaluation, {}
    others = Weights.of_place(other, recipe.data.train[0].path)
    theirs = _measure(others, attrs.evolve(recipe, **{name: getattr(others.recipe, name) for name in WEIGHTS}), how)
    evaluation = attrs.evolve(evaluation, against_path=_shown(other), against=_numbers(theirs, recipe.seed, how),
                         differences=_differences(own, theirs, recipe.seed, how))  # fmt: skip
    directions = {PREFIX + name: direction for name, direction in own.directions.items()}
    if how.gate in evaluation.differences and how.gate not in directions:
        directions[how.gate] = more_is_better(recipe, how.gate)
    return evaluation, directions


def _evaluate_engine(
    place: WeightsPlace, how: Measuring, other: WeightsPlace | None
) -> tuple[Evaluation, dict[str, bool | None]]:
    """Return the metrics over the answers of an engine, to the prompts of the rows that weights would answer."""
    for option, given in (("--against", other), ("--tasks", how.tasks), ("--device", how.device)):
        if given:
            problem = "an engine answers for the one model that it has, and nothing else is measured"
            raise LuthierError("recipe-conflict", problem, where=option, remedy="Leave it or --engine out.")
    weights = Weights.of_place(place, how.data)
    recipe = measured_recipe(weights, _changes(weights.recipe, how), how.data)
    found = measure_engine(recipe, how.engine, separate=how.data is not None, most=how.max_new_tokens)
    measured = Measured(units=found.rows, scores=found.scores, others={}, directions=found.directions)
    numbers = _numbers(measured, recipe.seed, how)
    return Evaluation(
        path=_shown(place), step=place.step, rows=found.rows, engine=found.engine, metrics=numbers
    ), found.directions


def _add_tasks(
    evaluation: Evaluation, benchmark: Benchmark, how: Measuring, place: WeightsPlace, other: WeightsPlace | None
) -> tuple[Evaluation, dict[str, bool | None]]:
    """Return the evaluation with the numbers of the tasks, and of each of these whether more is better."""
    own = run_benchmark(place, benchmark, how.tasks, how.device)
    theirs = {} if other is None else run_benchmark(other, benchmark, how.tasks, how.device)
    differences = {
        name: Number(value=score.value - theirs[name].value) for name, score in own.items() if name in theirs
    }
    evaluation = attrs.evolve(evaluation, metrics={**evaluation.metrics, **_task_numbers(own)},
                              against={**evaluation.against, **_task_numbers(theirs)},
                              differences={**evaluation.differences, **differences})  # fmt: skip
    return evaluation, {name: score.greater_is_better for name, score in own.items()}


def _task_numbers(scores: Mapping[str, BenchmarkScore]) -> dict[str, Number]:
    return {name: Number.of_task(score.value, score.stderr) for name, score in scores.items()}


def _changes(recipe: Recipe, how: Measuring) -> dict[str, Any]:
    changes: dict[str, Any] = {"metrics": [*recipe.metrics, *how.metrics]}
    changes |= {} if how.max_answers is None else {"max_eval_answers": how.max_answers}
    return changes | ({} if how.device is None else {"device": how.device})


def _measure(weights: Weights, recipe: Recipe, how: Measuring) -> Measured:
    setup, rows = set_up_weights(weights, recipe, separate=how.data is not None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_trained(setup))
        scores = score_units(setup, rows) if how.resamples else {}
        others: dict[str, float] = {}
        if not scores:
            over_tokens = {name: m for name, m in setup.metrics.items() if m.record.over == "tokens"}
            answers, setup.metrics = setup.metrics, over_tokens
            others = {name.removeprefix(PREFIX): value for name, value in evaluate_loss(setup, rows).items()}
            setup.metrics = answers
        with setup.optimizer_part.evaluating():
            scores |= measure_answers(setup, rows, how.max_new_tokens)
    directions = {name: metric.record.greater_is_better for name, metric in setup.metrics.items()}
    return Measured(units=len(rows), scores=scores, others=others, directions=directions)


def _numbers(measured: Measured, seed: int, how: Measuring) -> dict[str, Number]:
    numbers = {PREFIX + name: Number(value=value) for name, value in measured.others.items()}
    for name, scores in measured.scores.items():
        low, high = scores.interval(seed, how.resamples) if how.resamples and len(scores.rows) > 1 else (None, None)
        numbers[PREFIX + name] = Number(value=scores.value, low=low, high=high)
    alone = [PREFIX + name for name, scores in measured.scores.items() if len(scores.rows) == 1]
    if alone and how.resamples:
        log.warning("no interval over one row, which says nothing of others: give more rows", metrics=alone)
    return {name: number for name, number in numbers.items() if not math.isnan(number.value)}


def _differences(own: Measured, theirs: Measured, seed: int, how: Measuring) -> dict[str, Number]:
    """Ours less theirs, of every number that both have; the interval draws the same rows for both."""
    differences = {
        PREFIX + name: Number(value=own.others[name] - theirs.others[name])
        for name in own.others.keys() & theirs.others
    }
    for name, other in _shared(own, theirs):
        mine = own.scores[name]
        low = high = None
        if how.resamples and len(mine.rows) != len(other.rows):
            log.warning("no interval of a difference: other rows were dropped", metric=name)
        elif how.resamples and len(mine.rows) > 1:
            low, high = mine.difference_interval(other, seed, how.resamples)
        differences[PREFIX + name] = Number(value=mine.value - other.value, low=low, high=high)
    return differences


def _shared(own: Measured, theirs: Measured) -> Iterator[tuple[str, Scores]]:
    return ((name, theirs.scores[name]) for name in own.scores if name in theirs.scores)


def _gate(evaluation: Evaluation, directions: Mapping[str, bool | None], how: Measuring) -> Gate:
    require_metric(how.gate, evaluation.differences, "--gate")
    more = directions[how.gate]
    if more is None:
        raise LuthierError("recipe-conflict", "neither more nor less of this metric is better", where="--gate",
                           found=how.gate, remedy="Name another.")  # fmt: skip
    difference = evaluation.differences[how.gate].value
    assert how.max_regression is not None
    return Gate(metric=how.gate, regression=-difference if more else difference, max_regression=how.max_regression)


def _shown(place: WeightsPlace) -> str:
    return str(place.checkpoint or place.run or place.artifact)
