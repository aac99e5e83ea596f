"""Benchmarks of trained weights: they score with the adapter on, and what was measured of a run is kept in its folder."""

import json

import luthier
import pytest
import torch
from luthier import BenchmarkModel, BenchmarkScore, LuthierError
from luthier.model.attention import generating_attention
from luthier.model.generation.generation_inputs import compute_logits
from luthier.step.opened import open_artifact
from luthier.testing import expect_error

PAIRS = [([5, 6, 7], [8, 9]), ([9, 8, 7, 6, 5], [4, 3, 2]), ([1], [2])]


class Halves:
    """A benchmark in Python: how often the model finds a token likelier than another."""

    def __init__(self, value=None, stderr=0.1, greater_is_better=True):
        self.value, self.stderr, self.greater_is_better = value, stderr, greater_is_better

    def check(self, tasks):
        if set(tasks) - {"halves"}:
            raise LuthierError("part-unknown", "there is no such task", where="--tasks")

    def run(self, model, tasks):
        scores = [score for score, _ in model.score_tokens(PAIRS)]
        value = sum(scores) / len(scores) if self.value is None else self.value
        return [BenchmarkScore(task="halves", metric="nats", value=value, stderr=self.stderr, samples=len(scores),
                               greater_is_better=self.greater_is_better)]  # fmt: skip


@pytest.fixture(scope="module")
def run(model_folder, data_file, tmp_path_factory):
    how = {"max_steps": 2, "global_batch_size": 8, "learning_rate": 3e-2, "exact_callbacks": [], "adapter": "lora"}
    folder = tmp_path_factory.mktemp("benchmarked") / "run"
    return luthier.train(model=str(model_folder), data=str(data_file), output_dir=folder, **how)


def kept(run):
    path = run.output_path / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("adapter", ["lora", "prefix_tuning", {"name": "prompt_tuning", "num_virtual_tokens": 3}])
def test_a_text_is_scored_with_the_adapter_on(train, adapter):
    trained = train(adapter=adapter, max_steps=1, learning_rate=3e-2, exact_callbacks=[])
    opened = open_artifact(trained.output_path)
    found = BenchmarkModel(model=opened.model, tokenizer=opened.tokenizer, adapter=opened.adapter).score_tokens(PAIRS)
    for (score, is_likeliest), (context, continuation) in zip(found, PAIRS, strict=True):
        with generating_attention(opened.model):
            logits = compute_logits(opened.model, torch.tensor([*context, *continuation]), opened.adapter)
        logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
        assert score == pytest.approx(float(logprobs.gather(1, torch.tensor(continuation)[:, None]).sum()), abs=1e-3)
        assert is_likeliest == (logprobs.argmax(-1).tolist() == continuation)


def test_tasks_alone_need_no_rows_and_the_run_keeps_the_numbers(run):
    before = len(kept(run))
    found = luthier.evaluate(run.output_path, tasks=["halves"], benchmark=Halves())
    number = found.metrics["halves/nats"]
    assert (found.rows, set(found.metrics)) == (0, {"halves/nats"})
    assert (number.high - number.low, number.stderr) == (pytest.approx(2 * 1.96 * 0.1), 0.1)
    line = kept(run)[before]
    assert (line["format"], line["tasks"], line["path"]) == (1, ["halves"], found.path)
    assert line["metrics"]["halves/nats"]["value"] == number.value


def test_rows_and_tasks_stand_in_one_evaluation(run, data_file):
    found = luthier.evaluate(run.output_path, data_file, tasks=["halves"], benchmark=Halves(), resamples=0)
    assert found.rows > 0
    assert {"eval_loss", "halves/nats"} <= set(found.metrics)


def test_a_gate_knows_which_direction_of_a_task_is_better(run, model_folder):
    def measured(better):
        return luthier.evaluate(run.output_path, tasks=["halves"], benchmark=Halves(greater_is_better=better),
                                against=model_folder, max_regression=0.0, gate="halves/nats")  # fmt: skip

    more, less = measured(True), measured(False)
    difference = more.differences["halves/nats"].value
    assert difference != 0
    assert (more.gate.regression, less.gate.regression) == (-difference, difference)
    with expect_error("recipe-conflict", "--gate"):
        measured(None)


def test_a_task_that_does_not_exist_is_refused_and_nothing_is_kept(run):
    before = kept(run)
    with expect_error("part-unknown", "--tasks"):
        luthier.evaluate(run.output_path, tasks=["thirds"], benchmark=Halves())
    assert kept(run) == before


@pytest.mark.parametrize("wrong", [{"value": float("nan")}, {"stderr": -1.0}])
def test_a_number_that_is_none_is_refused(run, wrong):
    with expect_error("part-invalid", "halves/nats"):
        luthier.evaluate(run.output_path, tasks=["halves"], benchmark=Halves(**wrong))


def test_a_benchmark_that_gives_nothing_is_refused(run):
    silent = Halves()
    silent.run = lambda model, tasks: []
    with expect_error("part-invalid", "--tasks"):
        luthier.evaluate(run.output_path, tasks=["halves"], benchmark=silent)


def test_a_benchmark_that_is_not_installed_says_what_brings_it(run):
    with expect_error("part-unknown", "--benchmark"):
        luthier.evaluate(run.output_path, tasks=["halves"], benchmark="lm_evall")


def test_a_folder_that_cannot_be_written_is_a_warning(run, capsys):
    place = run.output_path / "evaluations.jsonl"
    held = place.read_bytes() if place.exists() else None
    place.unlink(missing_ok=True)
    place.mkdir()
    try:
        luthier.evaluate(run.output_path, tasks=["halves"], benchmark=Halves())
    finally:
        place.rmdir()
        if held is not None:
            place.write_bytes(held)
    said = capsys.readouterr()
    assert (said.out + said.err).count("evaluation_not_recorded") == 1
