"""The lines of metrics.jsonl: the numbers that other trainers' users look for, a format's number, one form of time."""

import json
import re
from datetime import UTC, datetime

import luthier
import pytest
from luthier.errors import LuthierError
from luthier.plugins.contracts.metric_names import PREFIXES, RUN_METRICS
from luthier.runs.metrics_file import FORMAT
from luthier.runs.run_folder import read_folder

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
MINI_TRAINER = {  # each key of its training_metrics_0.jsonl, and where a line of ours has it
    "step": "step",
    "epoch": "epoch",
    "steps_per_epoch": "steps_per_epoch",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "loss": "loss",
    "avg_loss_backward": "loss",
    "num_samples": "num_samples",
    "num_loss_counted_tokens": "supervised_tokens",
    "batch_num_loss_counted_tokens": "supervised_tokens",
    "num_total_tokens": "tokens",
    "grad_accum": "micro_batches",
    "avg_time_per_minibatch": "seconds_per_micro_batch",
    "time_per_batch": "seconds_per_step",
    "tokens_per_second": "tokens_per_second",
    "samples_per_second": "samples_per_second",
    "total_samples_accumulated": "samples",
    "total_tokens_accumulated": "total_tokens",
    "peak_memory_usage_GB": "peak_memory",
    "timestamp": "timestamp",
}
PHASES = {"seconds/data", "seconds/forward", "seconds/backward", "seconds/optimizer"}


@pytest.fixture(scope="module")
def trained(model_folder, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "run"
    path = folder.with_name("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_names = [{"name": "jsonl", "also": ["mini_trainer", "trl"]}]
    run = luthier.train(
        model=str(model_folder), data={"train": path, "validation": 0.2}, adapter={"name": "lora", "r": 2}, max_steps=4,
        global_batch_size=4, max_tokens_per_device=64, logging_steps=2, eval_steps=4, output_dir=folder,
        exact_callbacks=with_names, learning_rate=1e-3,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return run, [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def test_a_line_has_every_number_of_mini_trainer_and_the_time_of_each_phase(trained):
    _, lines, _ = trained
    for line in lines:
        assert set(MINI_TRAINER.values()) | PHASES <= line.keys()


def test_its_own_names_are_there_where_they_are_asked_for_with_the_same_values(trained):
    _, lines, evaluations = trained
    for line in lines:
        for theirs, ours in MINI_TRAINER.items():
            scale = 2**30 if theirs == "peak_memory_usage_GB" else None
            assert line[theirs] == (line[ours] / scale if scale else line[ours])
        assert (line["num_tokens"], line["train_runtime"]) == (line["total_tokens"], line["elapsed"])
        assert line["mean_token_accuracy"] == line["accuracy"]
    assert [line["val_loss"] for line in evaluations] == [line["eval_loss"] for line in evaluations] != []


def test_the_counts_of_a_line_are_those_of_the_steps_since_the_last_one(trained):
    run, lines, _ = trained
    assert [line["num_samples"] for line in lines] == [8, 8]
    assert [line["samples"] for line in lines] == [8, 16]
    assert sum(line["tokens"] for line in lines) == run.tokens_seen
    for line in lines:
        assert line["micro_batches"] >= 2  # 64 tokens hold no four rows
        assert line["seconds_per_micro_batch"] * line["micro_batches"] == pytest.approx(line["seconds_per_step"])
        assert line["samples_per_second"] * line["seconds_per_step"] * 2 == pytest.approx(line["num_samples"])
        assert sum(line[name] for name in PHASES) <= 1.5 * 2 * line["seconds_per_step"] + 0.5


def test_every_line_has_the_formats_number_and_a_time_in_utc_and_run_json_the_same(trained):
    run, lines, evaluations = trained
    record = json.loads((run.output_path / "run.json").read_text())
    times = [line["timestamp"] for line in (*lines, *evaluations)] + [record["created"], record["updated"]]
    assert all(TIME.fullmatch(time) for time in times)
    assert record["created"] <= lines[0]["timestamp"] <= lines[1]["timestamp"] <= record["updated"]
    assert abs((datetime.now(UTC) - datetime.fromisoformat(record["updated"])).total_seconds()) < 600
    assert {line["format"] for line in (*lines, *evaluations)} == {FORMAT}
    assert record["format"] == 1


def test_no_part_may_take_a_name_that_a_line_has_of_its_own(trained):
    _, lines, _ = trained
    ours = {ours for ours in MINI_TRAINER.values()} | PHASES | {"format"}
    assert all(name in RUN_METRICS or name.startswith(PREFIXES) for name in ours)


def test_a_run_of_a_later_format_is_neither_shown_nor_resumed_as_if_it_were_known(trained, tmp_path):
    run, _, _ = trained
    record = json.loads((run.output_path / "run.json").read_text())
    folder = tmp_path / "later"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({**record, "format": 2}))
    assert "has format 2, and this luthier reads 1" in read_folder(folder).damage
    with pytest.raises(LuthierError) as caught:
        luthier.train(run.output_path / "recipe.yaml", output_dir=folder)
    assert (caught.value.code, caught.value.where) == ("format-newer", str(folder))
