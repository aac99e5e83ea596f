"""A run over several ranks: the trajectory, the numbers and the files of one process, written by rank 0 alone."""

import json
import os
import signal

import luthier
import pytest
import torch
from luthier.distributed.agreement import local_callbacks
from luthier.distributed.world import World
from luthier.plugins.contracts.metric_names import repeatable_numbers
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks
from safetensors.torch import load_file

LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}


@pytest.fixture
def given(model_folder, rows, tmp_path):
    """The settings of a run of ten steps in `tmp_path/run`, with whatever is changed."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {
        "model": {"name_or_path": str(model_folder), "dtype": "float64"},
        "data": str(data),
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 5,
        "max_tokens_per_device": 50,
        "learning_rate": 1e-2,
        "max_steps": 10,
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "adapter": LORA,
        "memory_check": False,
        "output_dir": str(tmp_path / "run"),
    }
    return lambda **changes: {**fixed, **changes}


def seen(settings):
    """What a rank has seen of a run."""
    run = luthier.train(**settings)
    numbers = {"losses": run.loss_history, "eval": run.eval_metrics, "tokens": run.tokens_seen}
    return {**numbers, "steps": run.steps, "stop": run.stop_reason}


def artifact(folder):
    (path,) = [p for name in ("adapter", "model") for p in (folder / name).glob("*.safetensors")]
    return load_file(path)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ranks, alone, bound=1e-10):
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=bound)
        assert rank["eval"] == pytest.approx(alone["eval"], rel=bound)
        assert (rank["tokens"], rank["steps"]) == (alone["tokens"], alone["steps"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapter", ["full", LORA], ids=["full", "lora"])
def test_ten_steps_over_two_ranks_are_those_of_one(given, rows, tmp_path, adapter, strategy):
    settings = given(adapter=adapter, eval_data=rows[:7], eval_steps=4, max_eval_batches=2)
    alone = seen({**settings, "output_dir": str(tmp_path / "alone")})
    assert_same_run(in_ranks(2, seen, {**settings, "distributed": strategy}), alone)
    written, expected = artifact(tmp_path / "run"), artifact(tmp_path / "alone")
    assert written.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(written[name], expected[name], rtol=1e-6, atol=1e-7)
    for told, as_alone in zip(lines(tmp_path / "run"), lines(tmp_path / "alone"), strict=True):
        assert told.keys() - {"rank_imbalance"} == as_alone.keys()  # which a process alone has not
        for name in repeatable_numbers(as_alone).keys() - {"micro_batches"}:
            assert told[name] == pytest.approx(as_alone[name], rel=1e-9), name


def test_the_record_says_how_many_there_were_and_what_they_chose(given, tmp_path):
    in_ranks(2, seen, given(max_steps=2))
    record = read_record(tmp_path / "run")
    assert (record["world_size"], record["backend"], record["restarts"]) == (2, "gloo", 0)
    assert record["decisions"]["distributed.strategy"]["value"] == "ddp"
    assert "fits" in record["decisions"]["distributed.strategy"]["reason"]


def test_rank_0_alone_watches_writes_and_logs(given, tmp_path):
    def note():
        with (tmp_path / "fired").open("a") as file:
            file.write(f"{World.current().rank} ")

    in_ranks(2, seen, given(max_steps=3, exact_callbacks=["jsonl", luthier.on(step_ended=note)]))
    assert (tmp_path / "fired").read_text().split() == ["0"] * 3
    assert len(lines(tmp_path / "run")) == 3
    told = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len([line for line in told if line["event"] == "run started"]) == 1


class Asking:
    """Asks something of the run after a step, on rank 1 alone."""

    every_rank = True

    def __init__(self, step, ask):
        self.step, self.ask = step, ask

    @luthier.event
    def step_ended(self, run, step):
        if step == self.step and not run.is_main:
            self.ask(run)


def test_what_one_rank_asks_for_all_do(given, rows, tmp_path):
    asking = [
        Asking(2, lambda run: run.request_save()),
        Asking(3, lambda run: run.request_evaluation()),
        Asking(4, lambda run: run.request_stop("rank 1 has seen enough")),
    ]
    ranks = in_ranks(2, seen, given(exact_callbacks=["jsonl", *asking], eval_data=rows[:3]))
    assert [(rank["steps"], rank["stop"]) for rank in ranks] == [(4, "rank 1 has seen enough")] * 2
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [3]


def test_only_callbacks_that_say_so_run_on_other_ranks():
    assert local_callbacks({"a": Asking(1, None), "b": luthier.on(step_ended=lambda: None)}).keys() == {"a"}


def interrupted(settings):
    with pytest.raises(Interrupted) as caught:
        luthier.train(**settings)
    return [caught.value.exit_status, caught.value.step]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_signal_to_one_rank_saves_and_stops_all_and_they_go_on_bit_for_bit(given, rows, tmp_path, strategy):
    settings = given(
        distributed=strategy, max_steps=5, model=given()["model"] | {"dtype": "float32"}, optimizer="adamw",
        eval_data=rows[:3], eval_steps=3,
    )  # fmt: skip
    straight = in_ranks(2, seen, {**settings, "output_dir": str(tmp_path / "straight")})
    signalled = Asking(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    endings = in_ranks(2, interrupted, {**settings, "exact_callbacks": ["jsonl", signalled]})
    assert endings == [[143, 3], [143, 3]]
    assert read_record(tmp_path / "run")["state"] == "stopped"
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == []  # left, on all ranks
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    assert in_ranks(2, seen, settings) == straight
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [3, 5]
    written, expected = artifact(tmp_path / "run"), artifact(tmp_path / "straight")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def stopping(step):
    return luthier.on(step_ended=lambda run: run.step == step and os.kill(os.getpid(), signal.SIGTERM))


MOVES = [
    (1, 2, "full", "fsdp"),
    (2, 1, "full", "fsdp"),
    *(pytest.param(*move, marks=pytest.mark.slow) for move in (
        (2, 1, LORA, "ddp"), (4, 2, "full", "fsdp"), (2, 3, LORA, "fsdp"), (1, 2, LORA, "ddp"), (2, 1, LORA, "fsdp"), (4, 2, "full", "ddp"),
        (3, 2, {**LORA, "name": "dora"}, "fsdp"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "adapter", "strategy"), MOVES)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(given, tmp_path, before, after, adapter, strategy):
    settings = given(adapter=adapter, distributed=strategy, optimizer="adamw", max_steps=6)
    alone = seen({**settings, "output_dir": str(tmp_path / "alone")})
    in_ranks(before, interrupted, {**settings, "exact_callbacks": ["jsonl", stopping(3)]})
    assert_same_run(in_ranks(after, seen, settings), alone)
    assert (tmp_path / "run/checkpoints/step-00000003/shards").exists() == (strategy == "fsdp" and before > 1)


@pytest.mark.slow
def test_the_two_strategies_read_each_others_checkpoints(given, tmp_path):
    settings = given(adapter="full", optimizer="adamw", max_steps=6)
    alone = seen({**settings, "output_dir": str(tmp_path / "alone")})
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp")):
        here_ = {**settings, "output_dir": str(tmp_path / first)}
        in_ranks(2, interrupted, {**here_, "distributed": first, "exact_callbacks": ["jsonl", stopping(3)]})
        assert_same_run(in_ranks(2, seen, {**here_, "distributed": second}), alone)


def test_a_loaded_model_is_copied_and_never_taken_apart(given, rows):
    from luthier.testing.worlds import tiny_model, tiny_tokenizer

    def refused(settings):
        with expect_error("recipe-conflict", "distributed.strategy") as caught:
            luthier.train(**settings)
        return caught.value.where

    settings = given(model=(tiny_model(), tiny_tokenizer()), data=rows, max_steps=1, precision="float32")
    assert in_ranks(2, refused, {**settings, "distributed": "fsdp"}) == ["distributed.strategy"] * 2
    assert in_ranks(2, seen, settings)[0]["steps"] == 1
