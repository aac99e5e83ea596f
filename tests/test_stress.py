"""Stress: a run killed at random moments, whatever it does then, ends as one that nobody disturbed, bit for bit."""

import json
import os
import random
import shutil
import signal
import time

import luthier
import pytest
from luthier.checkpoint import folder as checkpoint
from luthier.plugins.contracts.metric_names import repeatable_numbers
from luthier.runs.writing.record import read_record

WHOLE = {  # everything that a run does: dropout, evaluation, the best of it, checkpoints in the background, a merged model
    "adapter": {"name": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
    **{"lr_scheduler_type": "cosine", "warmup_steps": 2, "merge": True},
    **{"save_steps": 1, "save_total_limit": 2, "eval_steps": 5, "load_best_model_at_end": True, "logging_steps": 3},
    "exact_callbacks": ["jsonl", {"name": "early_stopping", "patience": 100}],
}


def bytes_of(folder):
    """Every artifact's weights, and the numbers of the log that do not depend on the clock."""
    weights = {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/*.safetensors")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [repeatable_numbers(line) for line in lines]


class Death:
    """A callback that ends its process `delay` seconds of CPU after its first step begins, wherever it is by then.

    The kernel does it, in the middle of whatever C code is running: nothing is cleaned up, as after `kill -9`.
    """

    def __init__(self, delay):
        self.delay = delay

    def arm(self):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, max(self.delay, 1e-6))
        self.arm = lambda: None

    @luthier.event
    def step_started(self):
        self.arm()


def killed(settings, delay, from_the_start):
    """Whether a run in a forked process was killed; it may have been done before."""
    child = os.fork()
    if child == 0:
        death, status = Death(delay), 1
        try:
            if from_the_start:
                death.arm()
            luthier.train(**{**settings, "exact_callbacks": [*settings["exact_callbacks"], death]})
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGPROF), f"the run ended with {status}"
    return status != 0


class Tally:
    """Where the kills fell: how many while a checkpoint was being written, and after how many different steps."""

    def __init__(self):
        self.fell, self.saving, self.steps = 0, 0, set()

    def count(self, folder):
        self.fell += 1
        self.saving += any((folder / "checkpoints").glob(".step-*"))
        self.steps |= {checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)}


def undisturbed(train, settings, tmp_path):
    """The run as it should be, and the CPU seconds from its first step to its end."""
    began = []
    watch = luthier.on(step_started=lambda: began.append(time.process_time()))
    luthier.train(
        **{**settings, "exact_callbacks": [*settings["exact_callbacks"], watch], "output_dir": tmp_path / "straight"}
    )
    return time.process_time() - began[0]


def kills(train, tmp_path, data_file, count):
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(data_file.read_text().splitlines(True)[:4]))
    settings = {**train.args[0], **WHOLE, "eval_data": str(held_out), "num_train_epochs": 8 if count > 10 else 3}
    span = undisturbed(train, settings, tmp_path)
    chance, tally, ended = random.Random(0), Tally(), False
    while tally.fell < count or not ended:
        reach = span if chance.random() < 0.3 else 3 * span / count  # some die late, most before they come far
        delay = chance.uniform(0.0, reach) if tally.fell < count else 1e6
        if killed(settings, delay, from_the_start=chance.random() < 0.1):
            tally.count(tmp_path / "run")
        for folder in checkpoint.list_checkpoints(tmp_path / "run"):
            checkpoint.load_checkpoint(folder)  # whole at any moment
        ended = (read_record(tmp_path / "run") or {}).get("state") == "completed"
        if ended:
            assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "straight")
            assert not [*(tmp_path / "run").glob(".*"), *(tmp_path / "run/checkpoints").glob(".*")]
            shutil.rmtree(tmp_path / "run")
    return tally


def test_a_run_killed_a_few_times_ends_as_if_undisturbed(train, tmp_path, data_file):
    assert kills(train, tmp_path, data_file, 4).fell == 4


@pytest.mark.slow
def test_a_run_killed_at_fifty_random_moments_ends_as_if_undisturbed(train, tmp_path, data_file):
    tally = kills(train, tmp_path, data_file, 50)
    assert tally.fell == 50
    assert tally.saving >= 5
    assert len(tally.steps) >= 12
