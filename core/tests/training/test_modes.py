"""Training modes and streams in whole runs: what ends them, what they refuse, and that they go on bit for bit."""

import itertools
import json
import os
import signal

import luthier
import numpy as np
import pytest
import torch
from luthier.data.examples import TokenDataset, TokenExample
from luthier.errors import LuthierError
from luthier.plugins.contracts.metric_names import repeatable_numbers
from luthier.recipe import Recipe
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.step.schedule.learning_rates import Rates, endless_rates, schedule_rates
from luthier.step.schedule.total_steps import feed_of
from luthier.testing.worlds import save_tiny_model


class Stopper:
    """Sends a signal, or asks for the end, in the middle of a step."""

    def __init__(self, step, reason=None):
        self.last, self.reason = step, reason

    @luthier.event
    def step_ended(self, run, step):
        if step == self.last and self.reason is None:
            os.kill(os.getpid(), signal.SIGTERM)
        elif step == self.last:
            run.request_stop(self.reason)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [repeatable_numbers(line) for line in lines]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A GPT-2 with dropout in every place it knows."""
    drops = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return str(save_tiny_model(tmp_path_factory.mktemp("gpt2") / "model", "gpt2", **drops))


@pytest.fixture
def data(tmp_path, rows):
    for name, part in (("a", rows[:15]), ("b", rows[15:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(tmp_path / "[ab].jsonl")


ENDLESS = {"training_mode": "infinite", "lr_scheduler_type": "constant", "warmup_steps": 3}


@pytest.mark.parametrize(
    ("mode", "limits", "steps"),
    [
        ("epoch", {"num_train_epochs": 2}, 6),
        ("epoch", {"num_train_epochs": 0.5}, 2),
        ("step", {"max_steps": 5}, 5),
        ("token", {"max_tokens": 97}, 2),
        ("token", {"max_tokens": 240}, 3),
        ("token", {"max_tokens": 241}, 4),
        ("auto", {"max_steps": 9, "max_tokens": 97}, 2),
        ("auto", {"max_steps": 1, "max_tokens": 97}, 1),
        ("infinite", {}, None),
    ],
)
def test_a_mode_ends_by_its_own_limit_as_auto_does_with_it_alone(mode, limits, steps):
    lengths = [11] * 24  # ten supervised tokens each: 80 a step, 240 an epoch
    dataset = TokenDataset.of([TokenExample(input_ids=np.arange(n), labels=np.arange(n)) for n in lengths])
    least = {"model": "demo", "data": "rows.jsonl", "global_batch_size": 8, **limits}
    assert feed_of(Recipe.from_dict({**least, "training_mode": mode}), dataset).total == steps
    if mode != "infinite":
        assert feed_of(Recipe.from_dict(least), dataset).total == steps


@pytest.mark.parametrize("streaming", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_without_end_goes_on_until_a_signal_and_then_from_there(train, tmp_path, dropping, data, streaming):
    source = {"train": data, "streaming": streaming, "max_length": 100} | ({"shuffle_buffer": 6} if streaming else {})
    shared = {**ENDLESS, "model": dropping, "data": source}
    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=["jsonl", Stopper(4)])
    assert read_record(tmp_path / "run")["state"] == "stopped"
    ends = [
        train(**shared, output_dir=tmp_path / name, exact_callbacks=["jsonl", Stopper(8, "enough")])
        for name in ("run", "straight")
    ]
    assert same(*ends)
    assert [(run.steps, run.stop_reason) for run in ends] == [(8, "enough")] * 2
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    assert read_record(tmp_path / "run")["state"] == "completed"


def test_num_train_epochs_inf_is_a_run_without_end(train, tmp_path, data):
    seen = []
    watch = luthier.on(run_started=lambda run: seen.append(run.total_steps))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_train_epochs: .inf\nlr_scheduler_type: inverse_sqrt\n")
    loaded = Recipe.load(recipe, {"model": "demo", "data": data}, environ={})
    run = train(num_train_epochs=loaded.num_train_epochs, lr_scheduler_type="inverse_sqrt", torch_compile=False,
                exact_callbacks=["jsonl", "progress", "plot", watch, Stopper(5, "enough")])  # fmt: skip
    assert seen == [None]
    assert run.steps == 5
    assert (run.output_path / "loss.png").is_file()


def test_each_epoch_of_a_run_without_end_reads_every_row_in_another_order(train, data):
    from luthier.data.batches.example_feed import RowFeed
    from luthier.data.batches.row_order import Order
    from luthier.recipe.objects import Objects
    from luthier.training.assemble import assemble_run

    recipe = Recipe.from_dict({"model": "demo", "data": data, "global_batch_size": 8, **ENDLESS})
    feed = assemble_run(recipe, Objects()).setup.feed.feed  # inside the one that lays out units
    assert isinstance(feed, RowFeed) and feed.order == Order(size=24, batch=8, seed=0)
    steps = [sorted(e.where for e in p.examples) for p in itertools.islice(feed.portions(0), 9)]
    epochs = [list(itertools.chain(*steps[i : i + 3])) for i in (0, 3, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({str(epoch) for epoch in epochs}) == 3


EPOCHS = {"num_train_epochs": 3, "lr_scheduler_type": "constant"}
QUICK = {"lr_scheduler_type": "constant", "torch_compile": False}  # without a known end it would always pay back


SLOW = [pytest.param(limits, cut, marks=pytest.mark.slow) for limits in (EPOCHS, {"max_steps": 9}) for cut in (1, 3, 8)]


@pytest.mark.parametrize(("limits", "cut"), [(EPOCHS, 4), *SLOW])
def test_a_streamed_run_that_was_stopped_ends_as_one_that_was_not(train, tmp_path, dropping, data, limits, cut):
    shared = {
        "model": dropping,
        "data": {"train": data, "streaming": True, "shuffle_buffer": 5, "max_length": 100},
        **limits,
    }
    straight = train(**shared, output_dir=tmp_path / "straight", eval_data=[{"text": "some words"}])
    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=["jsonl", Stopper(cut)], eval_data=[{"text": "some words"}])
    resumed = train(**shared, eval_data=[{"text": "some words"}])
    assert resumed.steps == straight.steps == 9
    assert same(straight, resumed)
    assert resumed.loss_history == straight.loss_history
    assert resumed.eval_loss == straight.eval_loss
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_a_stream_trains_on_the_same_rows_as_the_same_rows_in_memory(train, tmp_path, data):
    shared = {"num_train_epochs": 2, **QUICK}
    streamed = train(**shared, data={"train": data, "streaming": True}, output_dir=tmp_path / "streamed")
    whole = train(**shared, data=data, output_dir=tmp_path / "whole")
    assert (streamed.steps, streamed.samples_seen, streamed.tokens_seen) == (
        whole.steps,
        whole.samples_seen,
        whole.tokens_seen,
    )
    assert streamed.final_loss == pytest.approx(whole.final_loss, rel=0.5)


def test_a_stream_that_ends_by_its_rows_evaluates_saves_and_logs_its_last_step(train, tmp_path, data, rows):
    source = {"train": data, "streaming": True}
    run = train(data=source, **QUICK, eval_data=rows[:3], logging_steps=100, num_train_epochs=2)
    assert run.steps == 6
    assert run.eval_loss is not None
    assert [line["step"] for line in metrics(run.output_path)] == [6, 6]
    assert (run.output_path / "checkpoints/step-00000006").is_dir()


def test_changed_files_of_a_stream_are_refused_on_resume(train, tmp_path, data):
    shared = {"data": {"train": data, "streaming": True}, "max_steps": 6}
    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=[Stopper(2)])
    path = tmp_path / "b.jsonl"
    path.write_text(path.read_text().replace("20 and 6", "21 and 6"))
    with pytest.raises(LuthierError) as caught:
        train(**shared)
    assert caught.value.code == "data-changed"


def test_a_token_that_the_model_does_not_know_is_refused_where_the_stream_meets_it(train, tmp_path):
    lines = [{"input_ids": [9, 8, 7]}] * 150 + [{"input_ids": [9, 4000]}]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(LuthierError) as caught:
        train(data={"train": str(path), "streaming": True, "shuffle_buffer": 8}, max_steps=100)
    assert (caught.value.code, caught.value.where) == ("model-vocabulary", f"{path}:151")


def test_documents_are_trained_in_blocks_from_memory_and_from_a_stream_alike(train, tmp_path, dropping):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"line {i} " + "word " * (i % 30) for i in range(60)))
    source = {"train": str(path), "text_unit": "line", "block_size": 64}
    shared = {"model": dropping, "global_batch_size": 4, "num_train_epochs": 2, "lr_scheduler_type": "constant"}
    whole = train(**shared, data=source, output_dir=tmp_path / "whole")
    streamed = train(**shared, data={**source, "streaming": True}, output_dir=tmp_path / "streamed")
    assert whole.samples_seen == streamed.samples_seen == 2 * -(-(whole.tokens_seen // 2) // 64)
    assert whole.tokens_seen == streamed.tokens_seen


def test_tokens_of_blocks_count_towards_max_tokens(train, tmp_path):
    rows = [{"text": "x" * 30}] * 40
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(data={"train": str(path), "block_size": 50}, max_tokens=300, global_batch_size=2)
    (*_, last) = metrics(run.output_path)
    assert last["supervised_tokens"] < 100
    assert run.steps == 4  # 300 / (2 blocks of 50 tokens, each document's first and each block's first unsupervised)


def test_the_first_line_after_a_kill_counts_the_steps_before_it_too(train, tmp_path, dropping, data):
    shared = {"model": dropping, "data": data, "num_train_epochs": 3, "logging_steps": 4, "save_steps": 3}
    train(**shared, output_dir=tmp_path / "straight")
    child = os.fork()
    if child == 0:
        kill = luthier.on(saved=lambda step: step == 6 and os.kill(os.getpid(), signal.SIGKILL))
        try:
            train(**shared, exact_callbacks=["jsonl", kill])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(**shared)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 8, 9]


@pytest.mark.parametrize(
    ("settings", "code", "where"),
    [
        ({"training_mode": "infinite"}, "recipe-conflict", "lr_scheduler_type"),
        ({**ENDLESS, "lr_scheduler_type": "cosine"}, "recipe-conflict", "lr_scheduler_type"),
        ({**ENDLESS, "lr_scheduler_type": "polynomial"}, "recipe-conflict", "lr_scheduler_type"),
        ({**ENDLESS, "lr_scheduler_type": "OneCycleLR", "warmup_steps": 0}, "recipe-conflict", "lr_scheduler_type"),
        ({**ENDLESS, "warmup_steps": 0, "warmup_ratio": 0.1}, "recipe-conflict", "warmup_ratio"),
        ({"streaming": True}, "recipe-conflict", "lr_scheduler_type"),
        ({"streaming": True, "max_tokens": 50}, "recipe-conflict", "lr_scheduler_type"),
    ],
)
def test_a_schedule_that_needs_a_length_is_refused_before_any_work(train, tmp_path, data, settings, code, where):
    source = {"train": data, "streaming": settings.pop("streaming", False)}
    with pytest.raises(LuthierError) as caught:
        train(data=source, **{"model": "no/such-model", **settings})
    assert (caught.value.code, caught.value.where) == (code, where)
    assert "max_steps" in caught.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_without_end_begin_as_those_of_a_long_run(name, warmup):
    found = Rates([], endless_rates(name, 2e-3, warmup, {}), peak=2e-3)
    assert [found[i] for i in range(30)] == schedule_rates(name, 2e-3, 30, warmup, {})
    assert found.total is None
    assert found[29] == schedule_rates(name, 2e-3, 30, warmup, {})[29]  # asked again


def test_decays_of_their_own_length_need_no_other():
    for name, settings in [("linear", {"decay_steps": 7}), ("cosine", {"decay_steps": 7, "min_lr": 1e-4})]:
        found = Rates([], endless_rates(name, 1e-3, 2, settings), peak=1e-3)
        assert [found[i] for i in range(12)] == pytest.approx(schedule_rates(name, 1e-3, 12, 2, settings))
    found = Rates([], endless_rates("StepLR", 1.0, 0, {"step_size": 2, "gamma": 0.5}), peak=1.0)
    assert [found[i] for i in (5, 0, 2, 3)] == [0.25, 1.0, 0.5, 0.5]
