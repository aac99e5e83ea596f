"""Metrics and penalties that are objects in Python train, evaluate and resume, and other commands do without them."""

import os
import signal

import luthier
import pytest
from luthier.runs.writing.active_run import Interrupted
from luthier.testing import expect_error
from luthier_metrics import ExactMatch
from luthier_objectives import L2


class Length:
    """A metric over answers: their mean length."""

    name = "length"
    greater_is_better = False

    def score_answer(self, prediction, reference):
        return float(len(prediction)), 1.0


class Surprise:
    """A metric over tokens: the mean entropy of what could come."""

    over, wants = "tokens", ("entropy",)

    def score_tokens(self, statistics):
        return float((statistics.entropy * statistics.weights).sum()), float(statistics.weights.sum())


class Pull:
    """A penalty of the weights: the sum of squares, `weight` times."""

    def __init__(self, weight):
        self.weight = weight

    def measure(self, groups):
        return self.weight * sum(parameter.square().sum() for group in groups for parameter in group.parameters)


def test_objects_report_and_penalise_as_installed_parts_do(train, rows, tmp_path):
    given = {"max_steps": 3, "eval_data": rows[:4], "max_eval_answers": 2}
    own = train(
        **given, metrics=[Length(), Surprise(), ExactMatch()], penalties=[Pull(0.5)], output_dir=tmp_path / "own"
    )
    named = train(**given, metrics=["exact_match"], penalties=[L2(weight=0.5)], output_dir=tmp_path / "named")
    plain = train(max_steps=3, output_dir=tmp_path / "plain")
    assert own.loss_history == pytest.approx(named.loss_history, rel=1e-5)
    assert own.loss_history != plain.loss_history
    assert own.eval_metrics["eval_length"] >= 0
    assert own.eval_metrics["eval_Surprise"] > 0
    assert own.eval_metrics["eval_exact_match"] == named.eval_metrics["eval_exact_match"]


def test_a_cut_run_goes_on_with_objects_given_again_and_is_evaluated_without_them(train, data_file):
    given = {"max_steps": 4, "save_steps": 1, "metrics": [Length()], "penalties": [Pull(0.5)], "eval_data": data_file,
             "max_eval_answers": 2}  # fmt: skip

    def terminate(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(**given, exact_callbacks=["jsonl", luthier.on(step_ended=terminate)])
    run = train(**given)
    assert len(run.loss_history) == 4
    bare = luthier.evaluate(run.output_path, resamples=0)
    again = luthier.evaluate(run.output_path, metrics=[Length(), ExactMatch()], resamples=0, max_answers=2)
    assert again.metrics.keys() - bare.metrics.keys() == {"eval_length", "eval_exact_match"}


@pytest.mark.parametrize(
    ("attributes", "place"), [({"over": "words"}, "metrics.0"), ({"wants": ("margin",)}, "metrics.0")]
)
def test_an_object_that_says_what_no_metric_is_gets_an_error(train, rows, attributes, place):
    metric = type("Odd", (Length,), attributes)()
    with expect_error("part-invalid", place):
        train(metrics=[metric], eval_data=rows[:2], max_steps=1)
