"""LoRA's a + resume + b is a + b, bit for bit, with dropout on: after SIGTERM, and after kill -9 during a save."""

import json
import os
import random
import select
import shutil
import signal
import time

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.step.opened import open_artifact

ADAPTERS = {
    "lora": {"name": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
    "dora": {"name": "dora", "r": 4, "lora_dropout": 0.1},
}
MORE = {
    "pissa": {"name": "lora", "r": 6, "init_lora_weights": "pissa", "rank_budget": 1500, "learn_scale": True},
    "whole modules": {"name": "lora", "modules_to_save": ["lm_head"], "loraplus_lr_ratio": 4.0},
    "token rows": {"name": "lora", "r": 4, "trainable_token_indices": [9, 40]},
    "adalora": {"name": "adalora", "init_r": 4, "target_r": 2, "deltaT": 2},
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 3},
    "encoded prefix": {"name": "p_tuning_v2", "num_virtual_tokens": 3},
    "rows": {"name": "modules", "token_ids": [9, 40], "norms": True},
}
EVERY = [
    *(pytest.param(adapter, id=name) for name, adapter in ADAPTERS.items()),
    *(pytest.param(adapter, id=name, marks=pytest.mark.slow) for name, adapter in MORE.items()),
]


def same(one, other):
    ours, theirs = (dict(run.model.named_parameters()) for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def terminated_after(step):
    """A callback that sends this process SIGTERM when the step has been taken."""
    last = step

    def end(step):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    return luthier.on(step_ended=end)


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("adapter", EVERY)
def test_a_run_that_was_terminated_resumes_bit_for_bit(train, tmp_path, adapter, cut):
    shared = {"adapter": adapter, "num_train_epochs": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(Interrupted) as caught:
        train(**shared, exact_callbacks=["jsonl", terminated_after(cut)])
    assert (caught.value.exit_status, caught.value.step) == (143, cut)
    assert read_record(tmp_path / "run")["state"] == "stopped"
    resumed = train(**shared)
    assert same(resumed, straight)
    assert resumed.loss_history == straight.loss_history
    assert (resumed.steps, resumed.tokens_seen) == (straight.steps, straight.tokens_seen)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, straight.steps + 1))


def test_dropout_is_drawn_anew_at_every_step_and_is_not_the_undropped_run(train, tmp_path):
    adapter = {"name": "lora", "target_modules": "all-linear"}
    dropped = train(adapter={**adapter, "lora_dropout": 0.1}, output_dir=tmp_path / "a")
    plain = train(adapter={**adapter, "lora_dropout": 0.0}, output_dir=tmp_path / "b")
    again = train(adapter={**adapter, "lora_dropout": 0.1}, output_dir=tmp_path / "c")
    assert dropped.loss_history == again.loss_history != plain.loss_history


def test_another_rank_does_not_resume_the_run_of_the_first(train, tmp_path):
    with pytest.raises(Interrupted):
        train(adapter={"name": "lora", "r": 4}, exact_callbacks=[terminated_after(1)])
    with pytest.raises(LuthierError) as caught:
        train(adapter={"name": "lora", "r": 8})
    assert caught.value.code == "run-folder-other"


class Killed:
    """A run in a forked process, killed by SIGKILL some time between two events, while it saves.

    The child tells of both events through a pipe, so that it is known where the kill fell.
    """

    def __init__(self, settings, begin="step_ended", end="saved"):
        self.settings, self.begin, self.end = settings, begin, end

    def __call__(self, delay):
        """Whether the process was killed after the first event and before the second."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            self._train(write)
        os.close(write)
        told = os.read(read, 1)
        if told == b"b":
            select.select([read], [], [], delay)  # until it has saved, or the delay is over
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(read, "rb") as rest:
            return told == b"b" and rest.read(1) == b""

    def _train(self, write):
        def begun():
            os.write(write, b"b")

        def ended():
            os.write(write, b"e")

        try:
            luthier.train(**{**self.settings, "exact_callbacks": [luthier.on(**{self.begin: begun, self.end: ended})]})
        finally:
            os._exit(1)


def kills_during_saves(train, tmp_path, count):
    """`count` kills that fell into a save, then the rest of the run, which must be as if nothing had been."""
    shared = {"adapter": ADAPTERS["dora"], "num_train_epochs": 3 * count, "save_steps": 1, "save_total_limit": 2}
    spans, clock = [], []
    watch = luthier.on(
        step_ended=lambda: clock.append(time.perf_counter()),
        saved=lambda: spans.append(time.perf_counter() - clock[-1]),
    )
    straight = train(**shared, exact_callbacks=[watch], output_dir=tmp_path / "straight")
    killed = Killed({**train.args[0], **shared})
    delays, fell = random.Random(0), 0
    for _ in range(straight.steps):
        fell += killed(delays.uniform(0.0, sorted(spans)[len(spans) // 2]))
        if fell == count:
            break
    assert fell == count
    finished = train(**shared)
    assert same(finished, straight)
    assert finished.loss_history == straight.loss_history
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert [
        checkpoint.load_checkpoint(folder)["tally"]["step"] for folder in checkpoint.list_checkpoints(tmp_path / "run")
    ]


def test_a_run_killed_during_saves_ends_as_if_undisturbed(train, tmp_path):
    kills_during_saves(train, tmp_path, count=4)


@pytest.mark.slow
def test_a_run_killed_during_twenty_saves_ends_as_if_undisturbed(train, tmp_path):
    kills_during_saves(train, tmp_path, count=20)


def test_a_run_killed_while_it_saves_its_artifacts_writes_them_whole_and_leaves_nothing_aside(train, tmp_path, logits):
    shared = {"adapter": ADAPTERS["lora"], "merge": True}
    clock = []
    watch = luthier.on(**dict.fromkeys(("task_ended", "completed"), lambda: clock.append(time.perf_counter())))
    straight = train(**shared, exact_callbacks=[watch], output_dir=tmp_path / "straight")
    killed = Killed({**train.args[0], **shared}, "task_ended", "completed")
    delays = random.Random(0)
    while not killed(delays.uniform(0.1, 0.9) * (clock[1] - clock[0])):
        shutil.rmtree(tmp_path / "run")  # it was done before the kill came
    finished = train(**shared)
    assert not list((tmp_path / "run").glob(".*"))
    assert same(finished, straight)
    for folder in (finished.artifact, finished.merged):
        assert torch.equal(
            logits(open_artifact(folder).model), logits(open_artifact(tmp_path / "straight" / folder.name).model)
        )


def test_a_run_killed_after_its_last_step_only_writes_what_is_missing(train, tmp_path):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    straight = train(output_dir=tmp_path / "straight")
    child = os.fork()
    if child == 0:
        try:
            train(exact_callbacks=[luthier.on(task_ended=die)])
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "run/adapter").exists()
    steps = []

    def note(step):
        steps.append(step)

    finished = train(exact_callbacks=[luthier.on(resumed=note, step_started=note)])
    assert steps == [straight.steps]
    assert finished.artifact.is_dir()
    assert same(finished, straight)
