"""Checks of benchmarks: finite numbers of the tasks that were asked for, and a model that is left as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.plugins.contracts.values import BenchmarkScore
from luthier.testing.laws import Subject, law

ABSENT: Final = "a-task-that-no-benchmark-has"


@law(1, default_only=True)
def gives_numbers_of_its_sample(subject: Subject, options: Any) -> None:
    """Its sample gives at least one finite number over some examples, with an error of 0 or more, or None."""
    scores = _scores(subject, options)
    assert scores, "no number of the sample"
    names = [(score.task, score.metric) for score in scores]
    assert len(set(names)) == len(names), f"two numbers have one name: {names}"
    for score in scores:
        assert math.isfinite(score.value), f"{score.metric} is {score.value}"
        assert score.stderr is None or score.stderr >= 0, f"the error of {score.metric} is {score.stderr}"
        assert score.samples > 0, f"{score.metric} is of {score.samples} examples"


@law(1, default_only=True)
def refuses_a_task_that_it_does_not_have(subject: Subject, options: Any) -> None:
    """`check` raises `LuthierError` for a task that does not exist, and lets the sample pass."""
    benchmark = subject.build(options)
    benchmark.check([_sample(subject)])
    try:
        benchmark.check([_sample(subject), ABSENT])
    except LuthierError:
        return
    raise AssertionError(f"check passes for the task {ABSENT!r}")


@law(1, default_only=True)
def gives_the_same_again(subject: Subject, options: Any) -> None:
    """A second run, of the same part or of another one, gives the same numbers."""
    benchmark, model = subject.build(options), _model()
    first, second = (list(benchmark.run(model, [_sample(subject)])) for _ in range(2))
    other = _scores(subject, options)
    assert first == second == other, f"{first}, then {second}, and {other} of another part"


@law(1, default_only=True)
def measures_the_model_that_it_is_given(subject: Subject, options: Any) -> None:
    """Models with other weights get other numbers, of at least one metric."""
    benchmark, plain = subject.build(options), _scores(subject, options)
    others = (list(benchmark.run(_model(seed), [_sample(subject)])) for seed in range(1, 6))
    assert any(scores != plain for scores in others), "five other models have the same numbers"


@law(1, default_only=True)
def leaves_the_model_alone(subject: Subject, options: Any) -> None:
    """A run changes no weight, and leaves the model in the mode in which it was."""
    import torch

    model = _model()
    before, training = copy.deepcopy(model.model.state_dict()), model.model.training
    subject.build(options).run(model, [_sample(subject)])
    same = all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())
    assert same, "a weight is another afterwards"
    assert model.model.training == training, "the model is in another mode afterwards"


def live(subject: Subject, options: Any) -> None:
    """Check and run the sample with these options."""
    subject.build(options).check([_sample(subject)])
    _scores(subject, options)


def _sample(subject: Subject) -> str:
    return subject.record.sample  # type: ignore[attr-defined]


def _scores(subject: Subject, options: Any) -> list[BenchmarkScore]:
    scores: Sequence[BenchmarkScore] = subject.build(options).run(_model(), [_sample(subject)])
    return list(scores)


def _model(seed: int = 0) -> Any:
    """Return a tiny model as `luthier evaluate` gives it to a benchmark."""
    from luthier.model.benchmark_model import BenchmarkModel
    from luthier.testing.worlds import tiny_model, tiny_tokenizer

    return BenchmarkModel(model=tiny_model(seed=seed).eval(), tokenizer=tiny_tokenizer(), max_tokens=2048)
