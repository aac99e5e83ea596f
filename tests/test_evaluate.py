"""`luthier evaluate`, and what else takes a checkpoint: the numbers of the run, again, from what lies in its folder."""

import json
import os
import signal
from contextlib import contextmanager

import luthier
import pytest
import torch
from luthier import LuthierError, OptimizerRecord, hookimpl
from luthier.cli.app import app
from luthier.model.attention import generating_attention
from luthier.plugins.loading import Source
from luthier.plugins.registry import installed_plugins
from luthier.runs.writing.active_run import Interrupted
from luthier.step.opened import open_artifact
from luthier.training.trained.open_weights import open_weights
from luthier.training.trained.weights_place import find_weights

SETTINGS = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "data.validation": 0.25, "exact_callbacks": ["jsonl"]}


@pytest.fixture
def trained(train, data_file):
    return lambda **changes: train(data=str(data_file), **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def run(model_folder, data_file, tmp_path_factory):
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    how = {**SETTINGS, "global_batch_size": 8, "learning_rate": 1e-2, "adapter": "lora"}
    return luthier.train(model=str(model_folder), data=str(data_file), output_dir=folder, **how)


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "eval_loss" in line}


def values(evaluation):
    return {name: number.value for name, number in evaluation.metrics.items()}


@pytest.mark.parametrize("resamples", [0, 20])
def test_a_finished_run_is_measured_as_it_was_at_its_end(run, resamples):
    found = luthier.evaluate(run.output_path, resamples=resamples)
    assert values(found) == pytest.approx(run.eval_metrics, rel=1e-5)
    for number in found.metrics.values():
        assert (number.low is None) == (resamples == 0)
        assert resamples == 0 or number.low <= number.value <= number.high


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_is_measured_as_the_run_did_there(run, step):
    expected = evaluations(run.output_path)[step]["eval_loss"]
    by_step = luthier.evaluate(run.output_path, step=step, resamples=0)
    by_folder = luthier.evaluate(run.output_path / "checkpoints" / f"step-{step:08d}", resamples=0)
    assert values(by_step)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert values(by_step) == values(by_folder)
    assert by_step.step == by_folder.step == step


def test_the_best_checkpoint_is_that_of_the_least_loss(run):
    found = luthier.evaluate(run.output_path, best=True, resamples=0)
    assert values(found)["eval_loss"] == pytest.approx(
        min(e["eval_loss"] for e in evaluations(run.output_path).values())
    )


class Interrupting:
    @luthier.event
    def step_ended(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_is_measured_answered_and_merged_from_its_newest_checkpoint(trained, tmp_path):
    with pytest.raises(Interrupted):
        trained(exact_callbacks=["jsonl", Interrupting()], adapter="lora")
    folder = tmp_path / "run"
    assert luthier.evaluate(folder, resamples=0).step == 3
    assert luthier.generate(folder, "1 and 1?", max_new_tokens=3) == luthier.generate(
        folder, "1 and 1?", max_new_tokens=3, step=3
    )
    assert luthier.merge(folder) == folder / "merged-step-00000003"


class Halving:
    """Evaluates with half of each weight that it steps, as averaging optimizers evaluate with others."""

    def __init__(self, options):
        self.parameters = []

    def build(self, groups):
        self.parameters = [p for group in groups for p in group.parameters]
        return torch.optim.SGD(self.parameters, lr=0.1)

    @contextmanager
    def evaluating(self):
        with torch.no_grad():
            for p in self.parameters:
                p.mul_(0.5)
            yield
            for p in self.parameters:
                p.mul_(2.0)


class Plugin:
    @hookimpl
    def luthier_optimizers(self):
        build = f"{__name__}:Halving"
        return [OptimizerRecord(name="halving", summary="An optimizer.", build=build)]


@pytest.fixture
def halving():
    installed_plugins.cache_clear()
    installed_plugins().register(
        Plugin(), Source(plugin="own", module=__name__, distribution="luthier-own", version="1.0")
    )
    yield
    installed_plugins.cache_clear()


@pytest.mark.parametrize(("adapter", "optimizer"), [("lora", "adamw"), ("full", "adamw"), ("lora", "halving")], ids=str)
def test_the_last_checkpoint_computes_what_the_artifact_does(trained, halving, tmp_path, adapter, optimizer):
    trained(adapter=adapter, optimizer=optimizer, max_steps=2)
    tokens = torch.arange(12)[None]
    one, other = open_artifact(tmp_path / "run"), open_weights(find_weights(tmp_path / "run", step=2))
    logits = []
    for opened in (one, other):
        with generating_attention(opened.model):
            logits.append(opened.model.float()(tokens).logits)
    assert torch.allclose(*logits, atol=1e-2 if adapter == "full" else 1e-5)
    assert one.tokenizer.chat_template == other.tokenizer.chat_template


def test_a_preference_run_keeps_its_reference(train, tmp_path):
    pairs = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "no"} for i in range(16)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    made = train(data=str(path), loss="dpo", **{**SETTINGS, "learning_rate": 1e-3})
    found = values(luthier.evaluate(made.output_path, step=4, resamples=20))
    assert found == pytest.approx(made.eval_metrics, rel=1e-3, abs=1e-4)
    assert found["eval_rewards/margins"] != 0


def test_weights_are_no_worse_than_themselves_and_worse_than_better_ones(run):
    same = luthier.evaluate(run.output_path, against=run.output_path, max_regression=0.0, resamples=20)
    assert same.passed
    assert same.differences["eval_loss"] == type(same.metrics["eval_loss"])(value=0.0, low=0.0, high=0.0)
    worse = luthier.evaluate(run.output_path, step=2, against=run.output_path, max_regression=0.0, resamples=0)
    assert worse.passed == (worse.differences["eval_loss"].value <= 0)


def test_one_row_has_no_interval_and_that_is_said(run, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"prompt": "1 and 2 is", "completion": " 3"}\n')
    with pytest.raises(SystemExit) as ended:
        app(
            ["evaluate", str(run.output_path), "--data", str(tmp_path / "one.jsonl"), "--against", str(run.output_path)]
        )
    said = capsys.readouterr()
    assert ended.value.code == 0 and ", 1 row\n" in said.out and " to " not in said.out
    assert "no interval over one row" in said.err


def test_a_model_that_nobody_trained_is_measured_over_a_file(run, model_folder, data_file):
    base = luthier.evaluate(model_folder, data_file, resamples=0)
    ours = luthier.evaluate(run.output_path, data_file, resamples=0, against=model_folder, max_regression=0.0)
    assert values(base)["eval_loss"] == pytest.approx(ours.against["eval_loss"].value, rel=1e-5)
    assert ours.rows == base.rows == 24
    assert ours.differences["eval_loss"].value < 0
    assert ours.passed


def test_answers_are_scored_with_an_interval_and_the_same_again(run):
    how = {"metrics": ["bleu", {"name": "pass_at_k", "k": 2, "num_answers": 3, "judge": "number"}], "resamples": 30}
    first, again = (luthier.evaluate(run.output_path, max_answers=4, **how) for _ in range(2))
    assert first == again
    assert {"eval_bleu", "eval_pass_at_k"} <= first.metrics.keys()
    assert first.metrics["eval_bleu"].low is not None


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ({"step": 3}, "artifact-not-found", "2, 4"),
        ({"step": 2, "best": True}, "recipe-conflict", "twice"),
        ({"max_regression": 0.1}, "recipe-missing", "--against"),
        ({"against": "self", "max_regression": 0.1, "gate": "eval_los"}, "recipe-conflict", "eval_loss"),
        ({"data": "nowhere.jsonl"}, "data-not-found", "nowhere"),
        ({"metrics": ["blue"]}, "part-unknown", "bleu"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(run, how, code, says):
    how = {name: run.output_path if value == "self" else value for name, value in how.items()}
    with pytest.raises(LuthierError) as caught:
        luthier.evaluate(run.output_path, resamples=0, **how)
    assert caught.value.code == code
    assert says in f"{caught.value} {caught.value.remedy}"


def test_a_misspelt_run_is_named(tmp_path):
    with pytest.raises(LuthierError, match="nothing-here") as caught:
        luthier.evaluate(tmp_path / "nothing-here")
    assert caught.value.code == "run-not-found"


def test_the_gate_decides_the_exit_status(run, capsys, data_file):
    words = ["evaluate", str(run.output_path), "--data", str(data_file), "--against", str(run.output_path), "--json"]
    found = {}
    for allowed in ("0", "-1"):
        with pytest.raises(SystemExit) as ended:
            app([*words, "--max-regression", allowed, "--resamples", "0"])
        found[allowed] = ended.value.code, json.loads(capsys.readouterr().out)
    assert found["0"][0] == 0
    assert found["-1"][0] == 1
    assert found["-1"][1]["gate"] == {"metric": "eval_loss", "regression": 0.0, "max_regression": -1.0, "passed": False}
