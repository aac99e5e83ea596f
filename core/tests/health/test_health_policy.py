"""A step that is not finite: stopped or skipped as the recipe says, counted, said aloud, and the weights untouched."""

import json
import math
import os
import signal

import luthier
import pytest
import torch
from luthier.errors import LuthierError
from luthier.health.monitor import IN_A_ROW
from luthier.plugins.contracts.values import LossOutput
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.testing import expect_error


class Failing:
    """The usual loss, NaN or infinite at some steps, which it knows by the rows; gradients follow it."""

    data = "tokens"

    def __init__(self, *texts, value=math.nan):
        self.texts, self.value = texts, value

    def terms(self, batch):
        return {"tokens": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        bad = any(place in self.texts for place in batch.where)
        logprobs = policy.token_logprobs(batch)
        total = -logprobs.sum() * (self.value if bad else 1.0)
        return LossOutput(sums={"tokens": total}, metrics={"seen": (total, 1.0)})


class Weights:
    """A callback that keeps the weights after each step, and the metrics."""

    def __init__(self, model):
        self.model, self.seen, self.metrics = model, [], []

    @luthier.event
    def step_ended(self, metrics):
        self.seen.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone())
        self.metrics.append(dict(metrics))


@pytest.fixture
def world():
    from luthier.testing.worlds import tiny_model, tiny_tokenizer

    return tiny_model(), tiny_tokenizer()


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_stop_is_the_default_and_leaves_the_weights_of_the_step_before(train, world, data):
    watcher = Weights(world[0])
    settings = {"model": world, "data": data, "global_batch_size": 4, "exact_callbacks": [watcher]}
    with pytest.raises(LuthierError) as caught:
        train(**settings, loss=Failing(f"{data}:7"))
    assert caught.value.code == "train-nonfinite"
    assert f"step {len(watcher.seen) + 1}" in caught.value.problem
    after = torch.cat([p.detach().flatten() for p in world[0].parameters()])
    assert not watcher.seen or torch.equal(after, watcher.seen[-1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_leaves_weights_and_optimizer_untouched_counts_the_step_and_says_so(train, world, data, tmp_path, value):
    watcher = Weights(world[0])
    settings = {"model": world, "data": data, "global_batch_size": 4, "exact_callbacks": ["jsonl", "plot", watcher]}
    settings |= {"packing": False}
    run = train(**settings, loss=Failing(f"{data}:7", value=value), on_nonfinite="skip", lr_scheduler_type="constant")
    [bad] = [i for i, loss in enumerate(run.loss_history) if not math.isfinite(loss)]
    assert 0 < bad < run.steps - 1
    assert torch.equal(watcher.seen[bad], watcher.seen[bad - 1])
    assert not torch.equal(watcher.seen[bad + 1], watcher.seen[bad])
    assert [m["skipped_steps"] for m in watcher.metrics] == [int(i >= bad) for i in range(run.steps)]
    told = (tmp_path / "run/log.jsonl").read_text()
    assert told.count("step skipped: not finite") == 1
    assert f"{data}:7" in told
    health = read_record(tmp_path / "run")["health"]
    assert health["skipped_steps"] == 1
    assert [r["step"] for r in health["remarks"] if r["kind"] == "nonfinite"] == [bad + 1]
    assert (tmp_path / "run/loss.png").exists()


def test_a_skipped_step_moves_no_weight_by_decay_or_momentum(train, world, data):
    """The other steps are those of a run whose optimizer never saw the step: SGD by hand."""
    watcher = Weights(world[0])
    settings = {
        "model": world,
        "data": data,
        "global_batch_size": 24,
        "num_train_epochs": 3,
        "exact_callbacks": [watcher],
    }
    optimizer = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}
    before = torch.cat([p.detach().flatten() for p in world[0].parameters()]).clone()
    with expect_error("train-nonfinite", "rows.jsonl:20 and 21 more rows"):
        train(**settings, optimizer=optimizer, loss=Failing(f"{data}:7"))
    run = train(**settings, optimizer=optimizer, loss=Failing(f"{data}:7"), on_nonfinite="skip", fresh=True)
    assert all(torch.equal(before, seen) for seen in watcher.seen)
    assert run.steps == 3


def test_metrics_and_record_stay_strict_json_and_windows_leave_skipped_steps_out(train, world, data, tmp_path):
    def refuse(name):
        raise ValueError(name)

    settings = {"model": world, "data": data, "global_batch_size": 4, "on_nonfinite": "skip"}
    run = train(**settings, loss=Failing(f"{data}:7"), logging_steps=2)
    lines = [json.loads(t, parse_constant=refuse) for t in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    finite = [loss for loss in run.loss_history if math.isfinite(loss)]
    assert all(min(finite) <= line["loss"] <= max(finite) for line in lines)
    assert all(math.isfinite(line["seen"]) for line in lines)
    json.loads((tmp_path / "run/run.json").read_text(), parse_constant=refuse)
    again = train(**settings, loss=Failing(f"{data}:7"), logging_steps=2)
    assert str(again.loss_history) == str(run.loss_history)


def test_ten_in_a_row_stop_the_run_all_the_same(train, world, data):
    every = [f"{data}:{i}" for i in range(1, 25)]
    with pytest.raises(LuthierError) as caught:
        train(
            model=world, data=data, loss=Failing(*every), on_nonfinite="skip", global_batch_size=4, num_train_epochs=9
        )
    assert caught.value.code == "train-nonfinite"
    assert f"step {IN_A_ROW}," in caught.value.problem and f"{IN_A_ROW}th" in caught.value.problem


def test_a_good_step_begins_the_count_again(train, world, data):
    bad = [f"{data}:{i}" for i in range(1, 24)]
    settings = {"model": world, "data": data, "on_nonfinite": "skip", "num_train_epochs": 6, "global_batch_size": 1}
    settings |= {"max_steps": 30}
    with expect_error("train-nonfinite", "rows.jsonl:6", "10th"):
        train(**settings, loss=Failing(*bad))
    good = [f"{data}:{i}" for i in range(1, 25, 2)]
    run = train(**settings, loss=Failing(*good), fresh=True)
    assert sum(not math.isfinite(loss) for loss in run.loss_history) > IN_A_ROW


def test_the_count_goes_on_after_a_resume(train, world, data, tmp_path, model_folder):
    settings = {"model": str(model_folder), "data": data, "global_batch_size": 4, "on_nonfinite": "skip"}
    straight = train(**settings, loss=Failing(f"{data}:7"), output_dir=tmp_path / "straight")
    [bad] = [i for i, loss in enumerate(straight.loss_history) if not math.isfinite(loss)]
    kill = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == bad + 1 else None)
    with pytest.raises(Interrupted):
        train(**settings, loss=Failing(f"{data}:7"), exact_callbacks=["jsonl", kill])
    resumed = train(**settings, loss=Failing(f"{data}:7"))
    assert str(resumed.loss_history) == str(straight.loss_history)
    one, two = (read_record(tmp_path / name)["health"] for name in ("straight", "run"))
    assert one == two
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_skipping_is_the_same_however_the_batch_is_cut(train, world, data, tmp_path, model_folder):
    settings = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "data": data, "on_nonfinite": "skip"}
    runs = [
        train(**settings, **cut, loss=Failing(f"{data}:7"), global_batch_size=6, output_dir=tmp_path / f"run-{i}")
        for i, cut in enumerate([{}, {"packing": False}])
    ]
    assert runs[0].loss_history == pytest.approx(runs[1].loss_history, rel=1e-10, nan_ok=True)


def test_the_learning_rate_waits_for_a_step_that_was_skipped_and_its_rows_are_done(train, world, data, tmp_path):
    settings = {"model": world, "data": data, "global_batch_size": 4, "packing": False, "lr_scheduler_type": "linear"}
    run = train(**settings, loss=Failing(f"{data}:7"), on_nonfinite="skip", learning_rate=1e-2)
    [bad] = [i for i, loss in enumerate(run.loss_history) if not math.isfinite(loss)]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    places = [*range(bad + 1), *range(bad, run.steps - 1)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (1 - p / run.steps) for p in places])
    assert run.samples_seen == 24
    told = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    [waits] = [line for line in told if "schedule waits" in line["event"]]
    assert (waits["step"], waits["schedule_step"]) == (bad + 1, bad)
