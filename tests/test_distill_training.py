"""Distillation trains: a model comes closer to its teacher, which may be quantized, and a cut run goes on to the bit."""

import json
import os
import signal

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.runs.writing.active_run import Interrupted
from luthier.testing import expect_error
from luthier.testing.worlds import SHAPE, save_tiny_model
from transformers import AutoModelForCausalLM, FalconConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("teacher") / "llama", seed=5))


def logged(run):
    return [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "reverse_kl", "top_k": 8},
        {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.1},
        {"hidden_weight": 1.0, "hidden_layers": [1, -1], "hidden_distance": "mse"},
    ],
    ids=["forward", "reverse", "jsd", "hidden"],
)
def test_a_model_comes_closer_to_its_teacher(train, teacher, options):
    run = train(loss={"name": "distill", **options}, adapter="full", teacher=teacher, learning_rate=3e-3,
                num_train_epochs=6)  # fmt: skip
    assert run.loss_history[-1] < 0.7 * run.loss_history[0]
    assert {"nll", "teacher_agreement"} <= logged(run)[-1].keys()


def test_a_teacher_may_be_quantized(train, teacher):
    spec = {"model": teacher, "quantizer": "nf4"}
    plain, rounded = (train(loss="distill", teacher=t, max_steps=1, output_dir=None) for t in (teacher, spec))
    assert plain.loss_history[0] == pytest.approx(rounded.loss_history[0], rel=0.2)
    assert plain.loss_history[0] != rounded.loss_history[0]


def test_a_cut_run_goes_on_to_the_bit(train, teacher, tmp_path):
    dropping = {"name": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
    settings = {"loss": {"name": "distill", "divergence": "jsd"}, "adapter": dropping, "teacher": teacher,
                "max_steps": 6, "save_steps": 2}  # fmt: skip
    straight = train(**settings, output_dir=tmp_path / "straight")

    def terminate(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(**settings, exact_callbacks=["jsonl", luthier.on(step_ended=terminate)])
    resumed = train(**settings)
    assert resumed.loss_history == straight.loss_history
    ours, theirs = (dict(run.model.named_parameters()) for run in (resumed, straight))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"hidden_weight": 1.0, "hidden_layers": [99]}, "2 layers"), ({"top_k": 999999}, "tokens")],
)
def test_what_the_model_has_not_as_many_of_is_refused_before_the_first_step(train, teacher, tmp_path, options, said):
    with pytest.raises(LuthierError) as caught:
        train(loss={"name": "distill", **options}, teacher=teacher)
    place = "loss.top_k" if "top_k" in options else "loss.hidden_layers"
    assert (caught.value.code, caught.value.where) == ("recipe-out-of-range", place)
    assert said in caught.value.problem
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_teacher_of_another_width_is_refused_before_the_first_step(train, tmp_path):
    wide = str(save_tiny_model(tmp_path / "wide", hidden_size=64, seed=5))
    with pytest.raises(LuthierError, match="wide"):
        train(loss={"name": "distill", "hidden_weight": 1.0}, teacher=wide)
    relation = {"name": "distill", "hidden_weight": 50.0, "hidden_distance": "relation"}
    run = train(loss=relation, teacher=wide, adapter="full", max_steps=6, learning_rate=3e-3)
    first, *_, last = [line["hidden_distance"] for line in logged(run) if "hidden_distance" in line]
    assert last < first


RELATED = {"name": "distill", "attention_weight": 5.0}


def test_attention_of_another_width_and_depth_is_learned(train, tmp_path):
    wide = str(save_tiny_model(tmp_path / "wide", hidden_size=64, num_hidden_layers=3, num_attention_heads=8, seed=5))
    given = {"loss": RELATED, "teacher": wide, "max_steps": 3, "learning_rate": 3e-3, "quantizer": "nf4"}
    run = train(**given)
    first, *_, last = [line["attention_divergence"] for line in logged(run) if "attention_divergence" in line]
    assert last < first


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"torch_compile": True}])
def test_relations_are_the_same_where_layers_are_computed_again_or_passes_compiled(train, teacher, tmp_path, changes):
    given = {"loss": RELATED, "teacher": teacher, "max_steps": 3, "learning_rate": 3e-3}
    plain = train(**given, output_dir=tmp_path / "plain")
    changed = train(**given, **changes, output_dir=tmp_path / "changed")
    assert changed.loss_history == pytest.approx(plain.loss_history, rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "options", "place"),
    [
        ("falcon", {}, "FalconForCausalLM"),
        ("llama", {"relation_heads": 5}, "loss.relation_heads"),
        ("llama", {"teacher_attention_layers": [7]}, "loss.teacher_attention_layers"),
    ],
)
def test_relations_that_a_teacher_cannot_give_are_refused_before_the_first_step(
    train, tmp_path, architecture, options, place
):
    other = str(save_tiny_model(tmp_path / "other", seed=5))
    if architecture == "falcon":  # it computes attention by itself
        config = FalconConfig(**SHAPE)
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(LuthierError) as caught:
        train(loss=RELATED | options, teacher=other)
    assert caught.value.where == place
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_plan_counts_the_relations(model_folder, teacher, rows):
    given = {"model": str(model_folder), "data": rows, "teacher": teacher, "global_batch_size": 24}
    plain, related = (luthier.plan(**given, loss=loss).memory for loss in ("distill", RELATED))
    assert related["activations"] > plain["activations"]


CACHED = {"loss": {"name": "distill", "top_k": 8, "temperature": 2.0}, "max_steps": 3, "save_steps": 1}


def test_a_cached_teacher_gives_the_numbers_of_a_live_one_and_a_cut_run_goes_on(train, teacher, rows, tmp_path):
    given = {**CACHED, "teacher": teacher, "eval_data": rows[:3]}
    live = train(**given, output_dir=tmp_path / "live")
    cached = train(**given, teacher_cache=True, output_dir=tmp_path / "cached")
    assert cached.loss_history == pytest.approx(live.loss_history, rel=1e-4)
    assert cached.eval_loss == pytest.approx(live.eval_loss, rel=1e-4)
    for one, other in zip(logged(live), logged(cached), strict=True):
        assert one.get("teacher_agreement") == other.get("teacher_agreement")
    assert len(list((tmp_path / "cached" / "constants").glob("teacher_cache-*.safetensors"))) == 1

    def terminate(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(**given, teacher_cache=True, exact_callbacks=["jsonl", luthier.on(step_ended=terminate)])
    assert train(**given, teacher_cache=True).loss_history == cached.loss_history


@pytest.mark.slow
def test_a_cache_of_another_teacher_is_refused(train, tmp_path):
    own = save_tiny_model(tmp_path / "teacher", seed=5)
    given = {**CACHED, "teacher": str(own), "teacher_cache": True}

    def terminate(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(**given, exact_callbacks=["jsonl", luthier.on(step_ended=terminate)])
    save_tiny_model(own, seed=6)
    with expect_error("checkpoint-other", "teacher_cache", "weights"):
        train(**given)


@pytest.mark.parametrize("options", [{}, {"top_k": 8, "hidden_weight": 1.0}, {"top_k": 8, "attention_weight": 1.0}])
def test_a_cache_is_refused_where_the_loss_reads_more_of_the_teacher(train, teacher, options, tmp_path):
    with expect_error("recipe-conflict", "teacher_cache"):
        train(loss={"name": "distill", **options}, teacher=teacher, teacher_cache=True, max_steps=1)
    assert not (tmp_path / "run").exists()
