"""Penalised and unlearning losses train: what is to be forgotten becomes unlikely, and the rest does not."""

import json

import luthier
import pytest


def logged(run):
    return [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """16 rows, every other one to be forgotten."""
    path = tmp_path_factory.mktemp("marked") / "rows.jsonl"
    rows = [{"prompt": f"{i}?", "completion": "yes" if i % 2 else "no", "forget": bool(i % 2)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("loss", ["npo", "negated"])
def test_rows_to_forget_become_unlikely_and_the_others_likely(train, marked, loss):
    run = train(data=marked, loss=loss, max_steps=12, global_batch_size=16)
    lines = logged(run)
    assert lines[-1]["nll/retain"] < lines[0]["nll/retain"] - 0.5
    if loss == "npo":
        assert lines[0]["log_ratio/forget"] == pytest.approx(0.0, abs=1e-5)
        assert lines[-1]["log_ratio/forget"] < -1.0
    else:
        assert lines[-1]["nll/forget"] > lines[0]["nll/forget"] + 0.5


def test_a_pull_to_the_reference_keeps_the_model_near_it(train, data_file):
    runs = [
        train(data=str(data_file), penalties=[{"name": "kl", "weight": weight}], max_steps=8, output_dir=None)
        for weight in (0.01, 10.0)
    ]
    loose, tight = (logged(run)[-1] for run in runs)
    assert tight["penalty/kl"] / 10.0 < 0.5 * loose["penalty/kl"] / 0.01
    assert tight["accuracy"] < loose["accuracy"]


def test_a_row_that_does_not_say_whether_to_forget_is_refused(train, data_file):
    with pytest.raises(luthier.LuthierError, match="forget"):
        train(data=str(data_file), loss="npo", max_steps=1)


def test_penalties_are_added_to_any_loss_and_shrink_the_weights(train, data_file):
    runs = [
        train(
            data=str(data_file), loss={"name": "sft", "z_loss": 1e-9}, max_steps=4, penalties=penalties, output_dir=None
        )
        for penalties in ([], ["l1", {"name": "l2", "weight": 1.0}])
    ]
    free, held = (sum(p.abs().sum() for g in run._setup.adapter.groups() for p in g.parameters) for run in runs)
    assert held < free
    assert "penalty" not in logged(runs[0])[0]
    assert logged(runs[1])[0]["penalty"] > 0
    nll, total = (logged(runs[1])[0][name] for name in ("nll", "loss"))
    assert total == pytest.approx(nll + logged(runs[1])[0]["penalty"], rel=1e-4)


class Cut:
    """A callback that ends a run within its third step, as a fault would, once."""

    done = False

    @luthier.event
    def step_started(self, run, step):
        if step == 3 and not self.done:
            self.done = True
            raise RuntimeError("cut off")


def test_a_full_model_is_pulled_to_where_it_began_and_a_resumed_run_knows_where_that_was(train, data_file, tmp_path):
    settings = {"data": str(data_file), "adapter": "full", "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    pulled = {**settings, "penalties": [{"name": "l2_start", "weight": 1.0}]}
    whole = train(**pulled, output_dir=str(tmp_path / "whole"))
    cut = Cut()
    with pytest.raises(RuntimeError, match="cut off"):
        train(**pulled, output_dir=str(tmp_path / "cut"), exact_callbacks=["jsonl", cut])
    resumed = train(**pulled, output_dir=str(tmp_path / "cut"), exact_callbacks=["jsonl", cut])
    distances = [[line["penalty"] for line in logged(run)] for run in (whole, resumed)]
    assert distances[0] == distances[1]
    assert distances[0][0] == 0.0 < distances[0][1]
    free = train(**settings, penalties=[{"name": "l2_start", "weight": 1e-9}], output_dir=None)
    assert logged(free)[-1]["penalty"] * 1e9 > 1.5 * distances[0][-1]


def test_a_plan_counts_the_copy_of_the_start(model_folder, data_file, tmp_path):
    settings = {"model": str(model_folder), "data": str(data_file), "adapter": "full", "max_steps": 1}
    memory = luthier.plan(**settings, penalties=["l2_start"], output_dir=str(tmp_path / "run")).memory
    assert 0.9 * memory["weights"] < memory["start"] <= memory["weights"]  # which has buffers too


def test_a_penalty_under_the_name_of_its_paper_is_answered_with_its_own(train, data_file):
    with pytest.raises(luthier.LuthierError) as caught:
        train(data=str(data_file), max_steps=1, penalties=["l2sp"])
    assert (caught.value.code, caught.value.where) == ("part-unknown", "penalties.0")
    assert "'l2_start'" in caught.value.remedy


def test_a_penalty_that_no_plugin_offers_is_refused_with_the_nearest(train, data_file):
    with pytest.raises(luthier.LuthierError, match=r"penalties\.0.*'l3'"):
        train(data=str(data_file), max_steps=1, penalties=["l3"])
