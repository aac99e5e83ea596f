"""Resume: a + resume + b is a + b, bit for bit, wherever and however the run was cut."""

import json
import os
import random
import signal
import time

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.testing.worlds import save_tiny_model


def tensors(run):
    return [p.detach().clone() for p in run.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A GPT-2 with dropout in every place it knows."""
    drops = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("gpt2") / "model", "gpt2", **drops)


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class _Stopper:
    def __init__(self, step):
        self.last = step

    @luthier.event
    def step_ended(self, run, step):
        if step == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["adamw", {"name": "sgd", "momentum": 0.9}])
def test_a_resumed_run_equals_a_straight_run_bit_for_bit_with_dropout(train, tmp_path, dropping, data, cut, optimizer):
    shared = {"model": str(dropping), "data": data, "num_train_epochs": 2, "optimizer": optimizer}
    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(Interrupted) as caught:
        train(**shared, exact_callbacks=["jsonl", _Stopper(cut)])
    assert caught.value.exit_status == 143
    assert read_record(tmp_path / "run")["state"] == "stopped"
    resumed = train(**shared)
    assert same(straight, resumed)
    assert resumed.loss_history == straight.loss_history
    assert resumed.samples_seen == straight.samples_seen
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, straight.steps + 1))


def test_resuming_takes_the_checkpoint_it_is_given(train, tmp_path, data):
    shared = {"data": data, "num_train_epochs": 2}
    straight = train(**shared, save_steps=2)
    other = train(**shared, save_steps=2, output_dir=tmp_path / "b", resume=tmp_path / "run/checkpoints/step-00000002")
    assert same(straight, other)
    assert other.loss_history == straight.loss_history


def test_a_checkpoint_of_another_recipe_or_of_other_data_is_refused_before_a_folder_appears(
    train, tmp_path, data, rows
):
    train(data=data)
    (taken,) = checkpoint.list_checkpoints(tmp_path / "run")
    data.write_text(data.read_text().replace("0 and 0", "9 and 9"))
    for changes, code in (({"optimizer": "sgd"}, "checkpoint-other"), ({}, "data-changed")):
        with pytest.raises(LuthierError) as caught:
            train(data=data, output_dir=tmp_path / "other", resume=taken, **changes)
        assert caught.value.code == code
        assert not (tmp_path / "other").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(train, tmp_path, data, capsys):
    shared = {"data": data, "num_train_epochs": 2, "save_steps": 2}
    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=[_Stopper(5)])
    newest = checkpoint.list_checkpoints(tmp_path / "run")[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = train(**shared)
    assert same(straight, resumed)
    assert "checkpoint damaged" in (tmp_path / "run/log.jsonl").read_text()


def test_a_run_that_goes_back_keeps_what_it_writes_from_there_and_sets_the_rest_aside(train, tmp_path, data):
    shared = {"data": data, "num_train_epochs": 2, "save_steps": 1}
    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=[_Stopper(5)])
    back = {**shared, "resume": tmp_path / "run/checkpoints/step-00000002", "save_total_limit": 2}
    with pytest.raises(Interrupted):
        train(**back, exact_callbacks=[_Stopper(3)])
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "run")] == [2, 3]
    assert sorted(p.name[-1] for p in (tmp_path / "run/set-aside").iterdir()) == ["3", "4", "5"]
    begun = []
    resumed = train(**back, exact_callbacks=[luthier.on(resumed=lambda step: begun.append(step))])  # noqa: PLW0108
    assert begun == [3]
    assert same(straight, resumed)


def test_changed_data_is_refused_on_resume(train, data):
    with pytest.raises(Interrupted):
        train(data=data, exact_callbacks=[_Stopper(1)])
    data.write_text(data.read_text().replace("0 and 0", "9 and 9"))
    with pytest.raises(LuthierError) as caught:
        train(data=data)
    assert caught.value.code == "data-changed"


def test_a_finished_run_is_returned_as_it_is(train, data, tmp_path):
    first = train(data=data, eval_data=None)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = train(data=data)
    assert again.run_id == first.run_id
    assert again.loss_history == first.loss_history
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert isinstance(again.generate("1 and 1?", max_new_tokens=2), str)
    assert same(again, first)


def test_fresh_trains_in_a_new_folder_beside_it(train, data, tmp_path):
    first = train(data=data)
    fresh = train(data=data, fresh=True)
    assert fresh.output_path == tmp_path / "run-2"
    assert fresh.loss_history == first.loss_history


def test_another_recipe_in_the_folder_is_refused(train, data):
    train(data=data)
    with pytest.raises(LuthierError) as caught:
        train(data=data, learning_rate=5e-3)
    assert caught.value.code == "run-folder-other"


def test_a_folder_of_other_files_is_refused_and_left_alone(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("mine")
    with pytest.raises(LuthierError) as caught:
        train()
    assert caught.value.code == "run-folder-other"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def killed_run(settings, delay):
    """Train in a forked child that dies by SIGKILL `delay` seconds after its first step."""
    child = os.fork()
    if child == 0:
        clock = {}

        def arm():
            if not clock:
                clock["set"] = signal.setitimer(signal.ITIMER_REAL, delay)

        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            luthier.train(**settings, exact_callbacks=["jsonl", luthier.on(step_started=arm)])
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def kills_until_done(train, tmp_path, model, data, count):
    shared = {"model": str(model), "data": data, "num_train_epochs": 6, "save_steps": 1, "save_total_limit": 2}
    settings = {**shared, "output_dir": tmp_path / "run", "global_batch_size": 8, "learning_rate": 1e-2}
    began = time.perf_counter()
    straight = train(**shared, output_dir=tmp_path / "straight")
    span = time.perf_counter() - began
    delays = random.Random(0)
    for _ in range(count):
        killed_run(settings, delays.uniform(0.001, span / 6))
    finished = train(**shared)
    assert same(straight, finished)
    assert finished.loss_history == straight.loss_history
    for folder in checkpoint.list_checkpoints(tmp_path / "run"):
        checkpoint.load_checkpoint(folder)


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(train, tmp_path, dropping, data):
    kills_until_done(train, tmp_path, dropping, data, count=4)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_weights_of_an_undisturbed_one(train, tmp_path, dropping, data):
    kills_until_done(train, tmp_path, dropping, data, count=20)


def test_two_processes_do_not_train_in_one_folder(train, tmp_path, data):
    from luthier.runs.writing.lock import locked_folder

    with locked_folder(tmp_path / "run"), pytest.raises(LuthierError) as caught:
        train(data=data)
    assert caught.value.code == "run-folder-locked"
    assert str(os.getpid()) in str(caught.value)
    assert caught.value.exit_status == 75
