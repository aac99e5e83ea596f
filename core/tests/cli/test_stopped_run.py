"""A run that somebody stopped is a run: it is talked with, evaluated, merged, listed, and goes on as if undisturbed."""

from __future__ import annotations

import json
import os
import signal

import luthier as luthier_package
import pytest
from luthier.runs.run_folder import read_folder
from luthier.runs.writing.active_run import Interrupted


class Stop:
    """Sends the signal of Ctrl-C while a step is under way."""

    @luthier_package.event
    def step_started(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "runs/mine"
    with pytest.raises(Interrupted) as caught:
        luthier_package.train(tiny / "r.yaml", output_dir=folder, exact_callbacks=["jsonl", Stop()])
    assert caught.value.exit_status == 130
    return folder


def test_it_is_talked_with_evaluated_and_merged_as_it_stands(stopped, luthier, tmp_path):
    assert read_folder(stopped).state == "stopped"
    (turn,) = luthier("chat", stopped, "--max-new-tokens", 2, "--json", stdin="How much?\n").document
    assert (turn["turn"], turn["tokens"]) == (1, 2)
    document = luthier("evaluate", stopped, "--json").document
    assert document["step"] == 2 and document["metrics"]["eval_loss"]["value"] > 0
    merged = luthier("merge", stopped, "--output-dir", tmp_path / "merged", "--json").document["merged"]
    answers = [luthier("generate", path, "How much?", "--max-new-tokens", 4, "--json").document["text"]
               for path in (stopped, merged)]  # fmt: skip
    assert answers[0] == answers[1]


def test_the_same_recipe_goes_on_as_if_it_had_not_been_stopped(stopped, tiny, luthier, tmp_path):
    straight = luthier("train", tiny / "r.yaml", "--output-dir", tmp_path / "straight", "--json").document
    resumed = luthier("train", tiny / "r.yaml", "--output-dir", stopped, "--json").document
    assert resumed["loss_history"] == straight["loss_history"]
    assert resumed["eval_metrics"] == straight["eval_metrics"]
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
