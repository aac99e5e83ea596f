"""Where there is no terminal the progress callback says something now and then, in the log."""

import json

import luthier
import luthier.builtin.progress as progress
from luthier.testing.worlds import save_tiny_model


def test_a_run_without_a_terminal_logs_steps_and_every_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(8)]
    model = save_tiny_model(tmp_path / "model")
    luthier.train(model=str(model), data=rows, eval_data=rows[:2], output_dir=tmp_path / "run", global_batch_size=4)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "training"] == [1, 2]
    assert [line["step"] for line in lines if line["event"] == "evaluated"] == [2]
    assert all("eval_loss" in line for line in lines if line["event"] == "evaluated")
