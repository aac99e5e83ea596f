"""Changes: what differs from what a run began with is refused by name, and goes on where it is allowed."""

import json
import os
import signal

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.runs.writing import differences as changes
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model

RATE = {"lr_scheduler_type": "constant"}


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cut(train, data, tmp_path):
    """A run cut off after its second step; `cut.again(...)` gives the same command with changes."""

    class Cut:
        folder = tmp_path / "run"
        taken = folder / "checkpoints/step-00000002"

        def again(self, **settings):
            return train(**{"data": data, **RATE, **settings})

    stop = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    with pytest.raises(Interrupted):
        Cut().again(exact_callbacks=[stop])
    return Cut()


def refused(act, code):
    with pytest.raises(LuthierError) as caught:
        act()
    assert caught.value.code == code, caught.value
    return str(caught.value)


def logged(folder):
    return (folder / "log.jsonl").read_text()


def test_changed_rows_go_on_where_that_is_allowed_and_it_is_said_and_recorded(cut, data, capsys):
    data.write_text(data.read_text().replace("0 and 0", "9 and 9"))
    assert "--allow-changed data" in refused(cut.again, "data-changed")
    before = read_record(cut.folder)
    run = cut.again(allow_changed="data")
    assert run.steps == 3
    record = read_record(cut.folder)
    assert record["data"] != before["data"]
    assert (record["run_id"], record["changes"][0]["step"]) == (before["run_id"], 2)
    assert "changed, as allowed" in capsys.readouterr().err
    assert cut.again().run_id == run.run_id  # what was allowed once is the run's own from then on


def test_another_optimizer_is_refused_and_where_allowed_begins_anew(cut, tmp_path):
    told = refused(lambda: cut.again(optimizer="sgd"), "run-folder-other")
    assert "optimizer was 'adamw', is 'sgd'" in told and "--allow-changed parts" in told
    assert refused(lambda: cut.again(optimizer="sgd", allow_changed="data"), "run-folder-other")
    run = cut.again(optimizer="sgd", allow_changed="parts")
    assert "begins anew" in logged(cut.folder)
    assert run.steps == 3
    assert "sgd" in (cut.folder / "recipe.yaml").read_text()


def test_another_option_of_the_same_optimizer_takes_effect_and_its_moments_stay(cut, tmp_path):
    changed = {"optimizer": {"name": "adamw", "weight_decay": 0.9}}
    run = cut.again(**changed, resume=cut.taken, output_dir=tmp_path / "other", allow_changed="parts")
    group = run._setup.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.9
    assert "weight_decay was 0.0" in str(read_record(tmp_path / "other")["changes"])
    assert {float(held["step"]) for held in run._setup.optimizer.state.values()} == {3.0}


def test_a_finished_run_goes_on_for_longer_where_its_settings_may_change(train, data, tmp_path):
    straight = train(data=data, num_train_epochs=2, **RATE, output_dir=tmp_path / "straight")
    train(data=data, **RATE)
    assert "num_train_epochs was 1.0, is 2" in refused(
        lambda: train(data=data, num_train_epochs=2, **RATE), "run-folder-other"
    )
    longer = train(data=data, num_train_epochs=2, **RATE, allow_changed=["settings"])
    assert longer.loss_history == straight.loss_history
    assert all(torch.equal(a, b) for a, b in zip(longer.model.parameters(), straight.model.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_refused(cut, tmp_path):
    other = save_tiny_model(tmp_path / "other-model", hidden_size=16)
    told = refused(lambda: cut.again(model=str(other), output_dir=tmp_path / "b", resume=cut.taken), "checkpoint-other")
    assert "model.name_or_path was" in told
    told = refused(
        lambda: cut.again(model=str(other), output_dir=tmp_path / "b", resume=cut.taken, allow_changed="model"),
        "checkpoint-corrupt",
    )
    assert "these weights are of another model" in told


def test_another_base_under_the_same_name_is_refused(cut, train, data, tmp_path):
    model = save_tiny_model(tmp_path / "mine")
    stop = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(model=str(model), data=data, exact_callbacks=[stop], output_dir=tmp_path / "own")
    save_tiny_model(tmp_path / "mine", seed=1)
    told = refused(lambda: train(model=str(model), data=data, output_dir=tmp_path / "own"), "checkpoint-other")
    assert "the base model was" in told and "--allow-changed model" in told


def test_other_versions_are_told_of_and_another_distribution_of_a_part_is_refused(cut, capsys):
    path = cut.folder / "run.json"
    record = json.loads(path.read_text())
    record["versions"]["torch"] = "2.0"
    next(p for p in record["parts"] if p["kind"] == "optimizer")["version"] = "0.0.1"
    path.write_text(json.dumps(record))
    other = json.loads(path.read_text())
    next(p for p in other["parts"] if p["kind"] == "optimizer")["distribution"] = "elsewhere"
    path.write_text(json.dumps(other))
    assert "optimizer adamw was 'elsewhere', is 'luthier'" in refused(cut.again, "checkpoint-other")
    path.write_text(json.dumps(record))
    cut.again()
    told = capsys.readouterr().err
    assert "other versions than the run began with" in told and f"2.0 -> {torch.__version__}" in told


def test_a_run_of_an_earlier_luthier_goes_on_although_there_are_new_options_since(cut):
    """Their defaults stand for what was done before there was a choice."""
    for path in (cut.folder / "recipe.yaml",):
        path.write_text("".join(line for line in path.read_text().splitlines(True) if "save_dtype" not in line))
    record = json.loads((cut.folder / "run.json").read_text())
    (cut.folder / "run.json").write_text(json.dumps({**record, "recipe_hash": "of an earlier luthier"}))
    assert cut.again().steps == 3


def test_a_run_that_began_from_anothers_checkpoint_goes_on_with_its_own(cut, train, data, tmp_path):
    def die(step):
        if step == 4:
            raise RuntimeError("cut")

    settings = {"data": data, **RATE, "resume": cut.taken, "output_dir": tmp_path / "b", "save_steps": 1}
    longer = {**settings, "num_train_epochs": 2, "allow_changed": "settings"}
    with pytest.raises(RuntimeError, match="cut"):
        train(**longer, exact_callbacks=[luthier.on(step_ended=die)])
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "b")] == [3]
    first = []
    train(**longer, exact_callbacks=[luthier.on(resumed=lambda step: first.append(step))])  # noqa: PLW0108
    assert first == [3]


def test_what_may_differ_is_one_of_four_words():
    assert changes.read_allowed("data, parts") == changes.read_allowed(["data", "parts"]) == {"data", "parts"}
    with expect_error("recipe-out-of-range", "allow_changed", "'data'") as caught:
        changes.read_allowed("dataa")
    assert caught.value.where == "allow_changed"


def test_no_more_than_a_few_differences_are_named():
    was = {"settings": {"data": {}, **{f"option{i}": 1 for i in range(9)}}}
    now = {"settings": {"data": {}, **{f"option{i}": 2 for i in range(9)}}}
    told = refused(
        lambda: changes.refuse_changes(changes.find_changes(was, now), frozenset(), "here"), "checkpoint-other"
    )
    assert told.count(" was 1, is 2") == changes.MENTIONED and "; ..." in told
