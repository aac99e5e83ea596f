"""Metrics as parts of a recipe: over the tokens of an evaluation, and over answers that are generated for it."""

import json
import math
import sys

import pytest
from luthier import LuthierError, MetricRecord, TokenStatistics, hookimpl
from luthier.plugins.loading import Source
from luthier.plugins.registry import installed_plugins

SEEN = []


class Length:
    def __init__(self, options):
        pass

    def score_answer(self, prediction, reference):
        SEEN.append((prediction, reference))
        return float(len(prediction)), 1.0


class Nats:
    def __init__(self, options):
        pass

    def score_tokens(self, statistics):
        assert isinstance(statistics, TokenStatistics)
        return float(-statistics.logprobs.sum()), float(len(statistics.labels))


class Hits:
    def __init__(self, options):
        pass

    def score_tokens(self, statistics):
        assert statistics.entropy.min() > 0
        return float(statistics.top1.sum()), float(len(statistics.labels))


class Wrong(Length):
    def score_answer(self, prediction, reference):
        return 1.0


class Plugin:
    @hookimpl
    def luthier_metrics(self):
        def record(name, **changes):
            return MetricRecord(name=name, summary="A metric.", build=f"{__name__}:{name.capitalize()}", **changes)

        tokens = {"over": "tokens"}
        return [
            record("length"),
            record("wrong"),
            record("nats", **tokens),
            record("hits", **tokens, wants=("entropy", "top1")),
        ]


@pytest.fixture(autouse=True)
def metrics(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Plugin.__module__])
    installed_plugins.cache_clear()
    installed_plugins().register(
        Plugin(), Source(plugin="own", module=__name__, distribution="luthier-own", version="1.0")
    )
    SEEN.clear()
    yield
    installed_plugins.cache_clear()


@pytest.fixture
def evaluated(train, rows):
    def run(*names, **changes):
        return train(max_steps=1, metrics=list(names), eval_data=rows[:6], **changes).eval_metrics

    return run


def test_a_metric_over_tokens_is_summed_over_the_pass(evaluated):
    found = evaluated("nats", "hits")
    assert found["eval_nats"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert 0.0 <= found["eval_hits"] <= 1.0


def test_it_does_not_depend_on_how_rows_are_packed(evaluated, tmp_path):
    packed = evaluated("nats", "hits", output_dir=tmp_path / "a")
    apart = evaluated("nats", "hits", packing=False, output_dir=tmp_path / "b")
    assert packed["eval_hits"] == pytest.approx(apart["eval_hits"])
    assert packed["eval_nats"] == pytest.approx(apart["eval_nats"], rel=1e-4)


def test_a_metric_over_answers_sees_generated_text_and_its_reference(evaluated, rows):
    found = evaluated("length", max_eval_answers=3)
    assert math.isfinite(found["eval_length"])
    references = [row["messages"][1]["content"] for row in rows[:3]]
    assert [reference for _, reference in SEEN[-3:]] == references
    assert found["eval_length"] == sum(len(prediction) for prediction, _ in SEEN[-3:]) / 3


def test_answering_changes_no_loss(train, rows, tmp_path):
    settings = {"max_steps": 4, "eval_steps": 2, "eval_data": rows[:4]}
    plain = train(**settings, output_dir=tmp_path / "plain")
    told = train(**settings, metrics=["length", "nats"], output_dir=tmp_path / "told")
    assert told.loss_history == plain.loss_history
    assert told.eval_metrics["eval_loss"] == plain.eval_metrics["eval_loss"]


def test_the_run_records_the_metrics_distribution(train, rows, tmp_path):
    train(max_steps=1, metrics=["nats"], eval_data=rows[:4])
    parts = json.loads((tmp_path / "run" / "run.json").read_text())["parts"]
    assert {"kind": "metric", "name": "nats", "distribution": "luthier-own", "version": "1.0"} in parts


def test_the_best_checkpoint_may_go_by_a_metric(evaluated):
    assert "eval_hits" in evaluated("hits", metric_for_best_model="eval_hits")


@pytest.mark.parametrize(
    ("names", "code", "says"),
    [
        (["nothing"], "part-unknown", ("metric",)),
        (["nats", "nats"], "recipe-conflict", ("twice",)),
        ([{"name": "nats", "depth": 3}], "recipe-unknown-option", ("depth",)),
        (["wrong"], "part-invalid", ("metric wrong",)),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(evaluated, names, code, says):
    with pytest.raises(LuthierError) as caught:
        evaluated(*names)
    assert caught.value.code == code
    assert all(fact in str(caught.value) for fact in says)
