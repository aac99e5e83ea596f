"""The loop: events where the picture draws them, how long a run is, evaluation, saving, stopping."""

import json
import re

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.plugins import events
from luthier.plugins.events import EVENTS
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer


def recorder():
    seen = []

    def recording(name):
        return lambda: seen.append(name)

    return seen, luthier.on(**{name: recording(name) for name in EVENTS})


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_event_fires_where_the_picture_draws_it(train, rows):
    seen, watcher = recorder()
    train(
        exact_callbacks=[watcher], eval_data=rows[:2], eval_steps=2, save_steps=3, num_train_epochs=2, async_save=False
    )
    step = ["step_started", "step_ended", "logged"]
    assert seen == [
        "run_started", "task_started",
        *step,
        *step, "evaluated",
        *step, "epoch_ended", "saved",
        *step, "evaluated",
        *step,
        *step, "epoch_ended", "evaluated", "saved",
        "task_ended", "completed",
    ]  # fmt: skip


def test_the_picture_names_the_events_in_the_order_of_their_specifications():
    drawn = re.findall(r"^ +(\w+)\(run", events.__doc__, re.MULTILINE)
    assert drawn == list(EVENTS)


def test_each_events_drawn_arguments_are_those_of_its_specification():
    import inspect

    for name, arguments in re.findall(r"^ +(\w+)\((run[^)]*)\)", events.__doc__, re.MULTILINE):
        assert list(inspect.signature(getattr(events.Events, name)).parameters)[1:] == arguments.split(", ")


def test_a_run_that_raises_fails_aloud_and_its_record_says_so(train, tmp_path):
    seen, watcher = recorder()

    def explode(step):
        if step == 2:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train(exact_callbacks=[watcher, luthier.on(step_ended=explode)])
    assert seen[-1] == "failed"
    assert "completed" not in seen
    assert read_record(tmp_path / "run")["state"] == "failed"
    assert read_record(tmp_path / "run")["error"] == "boom"


def test_a_parameter_that_no_gradient_reaches_is_named_and_only_that(train, tmp_path, capsys):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    train(model=(model, tokenizer), num_train_epochs=2)
    assert "no gradient reached" not in capsys.readouterr().err
    model.model.norm.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    train(model=(model, tokenizer), num_train_epochs=2, output_dir=tmp_path / "other")
    told = capsys.readouterr().err
    assert "no gradient reached" in told
    assert "model.norm.idle" in told


def test_a_callback_may_stop_the_run_after_a_step(train):
    seen, watcher = recorder()
    stop = luthier.on(step_ended=lambda run, step: run.request_stop("enough") if step == 2 else None)
    run = train(exact_callbacks=[watcher, stop])
    assert (run.steps, run.stop_reason) == (2, "enough")
    assert seen[-4:] == ["saved", "task_ended", "stopped", "completed"]


def test_a_callback_may_ask_for_a_checkpoint_and_an_evaluation(train, rows):
    seen, watcher = recorder()

    def ask(run, step):
        if step == 1:
            run.request_save()
            run.request_evaluation()

    train(exact_callbacks=[watcher, luthier.on(step_ended=ask)], eval_data=rows[:2], async_save=False)
    assert seen.index("saved") < seen.index("step_started", seen.index("step_started") + 1)
    assert seen.count("evaluated") == 2


def test_a_signal_saves_and_stops_and_only_stopped_fires(train, tmp_path):
    import os
    import signal

    seen, watcher = recorder()
    before = signal.getsignal(signal.SIGINT)
    kill = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    with pytest.raises(Interrupted) as caught:
        train(exact_callbacks=[watcher, kill])
    assert caught.value.exit_status == 130
    assert seen[-2:] == ["saved", "stopped"]
    assert "task_ended" not in seen
    assert checkpoint.newest_checkpoint(tmp_path / "run")[0].name == "step-00000002"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_train_epochs": 2}, 6),
        ({"num_train_epochs": 0.5}, 2),
        ({"max_steps": 5}, 5),
        ({"global_batch_size": 5}, 5),
        ({"max_steps": 5, "max_tokens": 10}, 1),
    ],
)
def test_a_run_is_as_long_as_its_settings_say(train, settings, steps):
    assert train(**settings).steps == steps


@pytest.mark.parametrize("limit", [1, 20, 100, 250])
def test_max_tokens_stops_at_the_step_that_reaches_it(train, tmp_path, limit):
    run = train(max_tokens=limit)
    counts = [line["supervised_tokens"] for line in metrics(tmp_path / "run")]
    assert sum(counts) >= limit > sum(counts[:-1])
    assert run.steps == len(counts)


def test_a_run_without_a_step_is_refused(train, tmp_path):
    with pytest.raises(LuthierError) as caught:
        train(num_train_epochs=0)
    assert caught.value.code == "recipe-out-of-range"
    assert not (tmp_path / "run").exists()


def test_each_logged_line_has_the_numbers_people_look_for(train, tmp_path):
    train()
    wanted = {"step", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_second",
              "peak_memory", "epoch"}  # fmt: skip
    for line in metrics(tmp_path / "run"):
        assert wanted <= line.keys()
        assert all(isinstance(v, (int, float)) for name, v in line.items() if name != "timestamp")
        assert line["tokens_per_second"] > 0
        assert line["peak_memory"] > 1e6
    assert metrics(tmp_path / "run")[-1]["epoch"] == 1.0


def test_logging_every_few_steps_sums_what_it_skipped_and_logs_the_last(train, tmp_path):
    every = train(output_dir=tmp_path / "a", num_train_epochs=2)
    train(output_dir=tmp_path / "b", num_train_epochs=2, logging_steps=4)
    fine, coarse = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [line["step"] for line in coarse] == [4, 6]
    assert coarse[0]["tokens"] == sum(line["tokens"] for line in fine[:4])
    weights = [line["supervised_tokens"] for line in fine[:4]]
    mean = sum(w * loss for w, loss in zip(weights, every.loss_history[:4], strict=True)) / sum(weights)
    assert coarse[0]["loss"] == pytest.approx(mean)
    hits = sum(w * line["accuracy"] for w, line in zip(weights, fine, strict=False))
    assert coarse[0]["accuracy"] == pytest.approx(hits / sum(weights))


def test_the_gradient_norm_is_reported_before_it_is_clipped(train, tmp_path):
    free = train(output_dir=tmp_path / "a", max_grad_norm=None, max_steps=1)
    clipped = train(output_dir=tmp_path / "b", max_grad_norm=0.01, max_steps=1)
    one, other = metrics(tmp_path / "a")[0]["grad_norm"], metrics(tmp_path / "b")[0]["grad_norm"]
    assert one == other > 0.01
    assert free.loss_history == clipped.loss_history


def test_clipping_bounds_the_step_that_sgd_takes(train, tmp_path, model_folder):
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    run = train(optimizer="sgd", max_grad_norm=0.5, max_steps=1, lr_scheduler_type="constant", learning_rate=1.0)
    moved = [a.detach() - b for a, b in zip(run.model.parameters(), start.parameters(), strict=True)]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(0.5, rel=1e-4)


def test_evaluation_is_weighted_by_tokens_whatever_its_batches(train, tmp_path, rows):
    one = train(output_dir=tmp_path / "a", eval_data=rows, max_steps=1)
    other = train(output_dir=tmp_path / "b", eval_data=rows, max_steps=1, max_tokens_per_device=64)
    assert one.eval_loss == pytest.approx(other.eval_loss, rel=1e-5)
    assert one.evaluate()["eval_loss"] == pytest.approx(one.eval_loss, rel=1e-6)
    assert one.eval_metrics["eval_perplexity"] == pytest.approx(torch.tensor(one.eval_loss).exp().item())


def test_the_perplexity_is_that_of_the_tokens_without_the_balance_of_experts(train, tmp_path, rows):
    model = save_tiny_model(tmp_path / "model", "mixtral")
    found = train(model=str(model), eval_data=rows[:4], max_steps=1, router_aux_loss_coef=0.5).eval_metrics
    own = found["eval_loss"] - 0.5 * found["eval_router_aux"]
    assert found["eval_perplexity"] == pytest.approx(torch.tensor(own).exp().item(), rel=1e-5)


def test_max_eval_batches_bounds_an_evaluation(train, rows, tmp_path):
    some = train(eval_data=rows, max_steps=1, max_tokens_per_device=64, max_eval_batches=1)
    whole = train(output_dir=tmp_path / "w", eval_data=rows, max_steps=1, max_tokens_per_device=64)
    assert some.eval_loss != whole.eval_loss


def test_the_model_trains_again_after_an_evaluation(train, rows):
    modes = []
    train(eval_data=rows[:2], eval_steps=1, exact_callbacks=[luthier.on(evaluated=lambda run: modes.append(1))])
    run = train(eval_data=rows[:2], eval_steps=1, fresh=True, max_steps=2)
    assert modes
    assert run.model.training


def test_early_stopping_waits_exactly_its_patience(train, rows, tmp_path):
    stopper = {"name": "early_stopping", "patience": 2, "min_delta": 100.0}
    run = train(exact_callbacks=["jsonl", stopper], eval_data=rows[:4], eval_steps=1, num_train_epochs=5)
    assert run.steps == 3
    assert "eval_loss has not improved" in run.stop_reason


def test_a_step_that_an_evaluation_makes_the_last_is_logged(train, rows, tmp_path):
    stopper = {"name": "early_stopping", "patience": 1, "min_delta": 100.0}
    run = train(
        exact_callbacks=["jsonl", stopper], eval_data=rows[:4], eval_steps=1, num_train_epochs=5, logging_steps=10
    )
    assert run.steps == 2
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [2]


def test_a_run_that_dies_after_its_early_stop_does_not_train_on(train, tmp_path):
    def die():
        raise RuntimeError("cut off before the artifact")

    stop = luthier.on(step_ended=lambda run, step: run.request_stop("enough") if step == 1 else None)
    with pytest.raises(RuntimeError, match="cut off"):
        train(exact_callbacks=[stop, luthier.on(task_ended=die)])
    run = train(exact_callbacks=["jsonl"])
    assert (run.steps, run.stop_reason) == (1, "enough")
    assert (tmp_path / "run/model/config.json").is_file()


@pytest.mark.parametrize("validation", [True, False])
def test_early_stopping_on_what_no_evaluation_gives_is_refused_before_anything_is_trained(
    validation, train, rows, tmp_path
):
    callback, held_out = {"name": "early_stopping", "metric": "eval_acuracy"}, {"eval_data": rows[:2], "eval_steps": 1}
    with expect_error("recipe-conflict", "early_stopping.metric") as refused:
        train(exact_callbacks=[callback], **(held_out if validation else {}))
    assert refused.value.where == "early_stopping.metric"
    assert not (tmp_path / "run").exists()


def test_a_metric_that_only_the_loss_has_may_stop_a_run(train, rows):
    stopper = {"name": "early_stopping", "metric": "eval_accuracy", "mode": "max", "patience": 1, "min_delta": 1.0}
    assert train(exact_callbacks=[stopper], eval_data=rows[:2], eval_steps=1).steps == 2


def test_the_best_checkpoint_outlives_the_limit_and_ends_the_run(train, tmp_path, rows):
    run = train(
        eval_data=rows[:6],
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_perplexity",
        greater_is_better=True,  # the worst is the best here, so that it comes before the end
    )
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line}
    best = max(losses, key=losses.get)
    assert best < run.steps
    assert run.eval_loss == pytest.approx(losses[best], rel=1e-6)
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert run.best_checkpoint.name == f"step-{best:08d}"
    assert {p.name for p in checkpoint.list_checkpoints(tmp_path / "run")} == {
        f"step-{best:08d}",
        f"step-{run.steps:08d}",
    }


def test_the_evaluation_before_the_first_step_is_no_checkpoints(train, rows):
    worse = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": None}
    run = train(**worse, eval_data=rows[:6], eval_steps=1, eval_on_start=True, load_best_model_at_end=True)
    assert run.best_checkpoint is not None
    assert run.evaluate()["eval_loss"] == pytest.approx(run.eval_loss, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(train, tmp_path):
    seen, watcher = recorder()
    with pytest.raises(LuthierError) as caught:
        train(
            learning_rate=1e30,
            lr_scheduler_type="constant",
            max_grad_norm=None,
            exact_callbacks=[watcher],
            save_steps=1,
        )
    assert caught.value.code == "train-nonfinite"
    assert "step" in caught.value.problem
    assert seen[-1] == "failed"


def test_callbacks_with_state_go_on_from_it(train, tmp_path, rows):
    import os
    import signal

    settings = {"eval_data": rows[:4], "eval_steps": 1, "num_train_epochs": 4}
    stopper = {"name": "early_stopping", "patience": 3, "min_delta": 100.0}
    kill = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
    with pytest.raises(Interrupted):
        train(**settings, exact_callbacks=[stopper, kill])
    run = train(**settings, exact_callbacks=[stopper])
    assert run.steps == 4


def test_the_run_folder_holds_what_is_needed_to_train_again(train, tmp_path):
    train(exact_callbacks=["jsonl", "plot"], save_steps=2)
    record = read_record(tmp_path / "run")
    assert record["state"] == "completed"
    assert {"seed", "versions", "device", "threads", "processor", "recipe_hash", "parts", "data"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    for name in ("recipe.yaml", "metrics.jsonl", "log.jsonl", "loss.png", "model/model.safetensors", "checkpoints"):
        assert (tmp_path / "run" / name).exists(), name
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_callback_argument_is_named_before_training(train, tmp_path):
    with expect_error("part-invalid", "on(step_ended=)", "'stepp'"):
        luthier.on(step_ended=lambda stepp: None)
    with pytest.raises(LuthierError, match="step_ended"):
        luthier.on(step_endet=lambda: None)
