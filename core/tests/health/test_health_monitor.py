"""What a run's log and record say of its health, on real runs of a tiny model."""

import json
import os
import signal

import luthier
import pytest
import torch
from luthier.health.reach import fingerprint
from luthier.plugins.contracts.values import LossOutput
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.testing.worlds import tiny_model, tiny_tokenizer


@pytest.fixture
def health(train, tmp_path):
    """The `health` of run.json, and the log's events, of one run."""

    def run(**changes):
        train(**changes)
        folder = tmp_path / "run"
        events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
        return read_record(folder)["health"], events

    return run


def remarks(found, kind):
    return [remark for remark in found["remarks"] if remark["kind"] == kind]


def test_a_healthy_run_has_nothing_to_tell(health):
    found, _ = health(num_train_epochs=4)
    assert found == {"skipped_steps": 0, "loss_spikes": 0, "remarks": []}


def test_parameters_that_no_gradient_reaches_are_named(health):
    model = tiny_model()
    model.model.norm.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    found, events = health(model=(model, tiny_tokenizer()), num_train_epochs=4)
    [remark] = remarks(found, "unreached")
    assert remark["first"] == ["model.norm.idle"]
    assert (remark["parameters"], remark["step"]) == (1, 5)
    assert events.count("no gradient reached") == 1
    assert remarks(found, "unmoved") == []


class Half:
    """SGD that leaves every second parameter as it is."""

    def build(self, groups):
        kept = [p for group in groups for p in group.parameters]
        return torch.optim.SGD([{"params": kept[::2], "lr": 0.0}, {"params": kept[1::2], "lr": 0.0, "lr_scale": 0.0}])

    def evaluating(self):
        import contextlib

        return contextlib.nullcontext()


@pytest.mark.parametrize("epochs", [1, 4], ids=["a short run", "a longer one"])
def test_weights_that_do_not_move_are_named(health, epochs):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    found, events = health(model=(model, tiny_tokenizer()), optimizer=Half(), num_train_epochs=epochs, packing=True)
    [remark] = remarks(found, "unmoved")
    assert remark["parameters"] == len(names) // 2
    assert remark["step"] == min(10, 3 * epochs)
    assert events.count("weights do not change although a gradient reaches them") == 1


def test_a_rate_of_zero_for_the_whole_run_is_told_at_once(health):
    found, events = health(learning_rate=0.0, num_train_epochs=4)
    assert [r["kind"] for r in found["remarks"]] == ["rate"]
    assert events.index("the learning rate is 0 for the whole run") <= 2


class Harsh:
    """The usual loss, thirty times as much for one row."""

    data = "tokens"

    def __init__(self, where):
        self.where = where

    def terms(self, batch):
        return {"tokens": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        factor = 30.0 if self.where in batch.where else 1.0
        return LossOutput(sums={"tokens": -policy.token_logprobs(batch).sum() * factor})


def test_a_loss_spike_is_told_with_the_file_and_line_of_its_rows(health, tmp_path, rows):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, events = health(data=data, loss=Harsh(f"{data}:11"), global_batch_size=1, num_train_epochs=2)
    spikes = remarks(found, "spike")
    assert spikes
    assert {place for spike in spikes for place in spike["rows"]} == {f"{data}:11"}
    assert all(spike["factor"] > 5 for spike in spikes)
    assert events.count("loss spike") == len(spikes) == found["loss_spikes"]


def test_a_model_that_learns_nothing_is_told(health):
    found, events = health(learning_rate=1e-12, global_batch_size=2, num_train_epochs=6)
    [remark] = remarks(found, "flat")
    assert remark["step"] == 72
    assert "the model learns nothing: its loss has not fallen" in events


def test_what_was_seen_before_a_kill_counts_after_it(train, tmp_path):
    model = tiny_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    settings = {"model": str(folder), "num_train_epochs": 5, "optimizer": Half()}
    train(**settings, output_dir=tmp_path / "straight")
    kill = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)
    with pytest.raises(Interrupted):
        train(**settings, exact_callbacks=["jsonl", kill])
    assert read_record(tmp_path / "run")["health"]["remarks"] == []
    train(**settings)
    assert read_record(tmp_path / "run")["health"] == read_record(tmp_path / "straight")["health"]
    assert read_record(tmp_path / "run")["health"]["remarks"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_fingerprint_changes_with_one_bit_and_with_nothing_else(dtype):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = values.clone()
    assert fingerprint(values) == fingerprint(other) == fingerprint(other.T.contiguous().T)
    other.view(torch.uint8)[3, 2] ^= 1
    assert fingerprint(values) != fingerprint(other)
