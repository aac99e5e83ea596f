"""Quantizers in a run: when they are told how far it is, and layers whose latent weight is trained."""

import json
import os
import signal

import luthier
import pytest
import torch
from luthier.runs.writing.active_run import Interrupted
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


class TernaryLinear(nn.Module):
    """Computes with its latent `weight`, by `share` drawn to -s, 0 and s."""

    def __init__(self, layer, told):
        super().__init__()
        self.told = told
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.share = layer.weight, layer.bias, 0.0

    def effective(self):
        latent = self.weight.detach()
        scale = latent.abs().mean().clamp_min(1e-8)
        return self.weight + self.share * ((latent / scale).round().clamp(-1, 1) * scale - latent)

    def forward(self, states):
        self.told.append("run")
        return F.linear(states, self.effective(), self.bias)


class Ternary:
    """A quantizer whose layers are trained. `told` is every call, and every forward with the share it was made with."""

    trains, provides, halves = True, ("dense-weights",), False

    def __init__(self, **members):
        self.told, self.contexts = [], []
        vars(self).update(members)

    def __deepcopy__(self, memo):
        return type(self)(**{name: value for name, value in vars(self).items() if name != "told"})

    def apply(self, model, context):
        self.contexts.append((context.purpose, context.has_values))
        head = model.get_output_embeddings()
        for path, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]:
            model.set_submodule(path, TernaryLinear(layer, self.told))
        self.layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
        return model

    def dequantize(self, layer):
        return layer.effective().detach().float() if isinstance(layer, TernaryLinear) else None

    def requantize(self, layer, weight):
        layer.weight.data.copy_(weight)

    def progressed(self, progress):
        self.told.append((progress.step, progress.total_steps))
        for layer in self.layers:
            layer.share = progress.step / progress.total_steps
        return luthier.Multipliers(lr=0.5 if self.halves else 1.0)


@pytest.fixture
def ternary(train):
    def run(**changes):
        return train(**{"adapter": "full", "quantizer": Ternary(), "max_steps": 4, "learning_rate": 1e-3, **changes})

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder):
    return [line for line in lines(folder) if "loss" in line]


def evaluations(folder):
    return [(line["step"], line["eval_loss"]) for line in lines(folder) if "eval_loss" in line]


class Watch:
    """Notes, among the calls of a quantizer, where the events of the run fire."""

    def __init__(self, quantizer):
        self.told = quantizer.told

    @luthier.event
    def run_started(self):
        self.told.append(("run started", 0))

    @luthier.event
    def step_ended(self, step):
        self.told.append(("step ended", step))

    @luthier.event
    def evaluated(self, step):
        self.told.append(("evaluated", step))

    @luthier.event
    def completed(self):
        self.told.append(("completed", 4))


def test_it_is_told_the_steps_done_before_each_step_and_evaluation_and_the_artifact(ternary, rows):
    quantizer = Ternary()
    ternary(quantizer=quantizer, eval_data=rows[:4], eval_steps=2, exact_callbacks=[Watch(quantizer)])
    done, seen, runs = None, [], []
    for told in quantizer.told:
        if told == "run":
            runs.append(done)
        elif isinstance(told[0], str):
            seen.append((*told, sorted(set(runs))))
            runs = []
        else:
            done, total = told
            assert total == 4
    # the steps that it had been told of at each run of the model before an event
    assert seen == [
        ("run started", 0, [0, 4]),  # the untrained artifact is tried as at the end
        ("step ended", 1, [0]),
        ("step ended", 2, [1]),
        ("evaluated", 2, [2]),
        ("step ended", 3, [2]),
        ("step ended", 4, [3]),
        ("evaluated", 4, [4]),
        ("completed", 4, [4]),
    ]


def test_the_multipliers_are_those_of_the_step_that_follows(ternary, tmp_path):
    ternary(quantizer=Ternary(halves=True), lr_scheduler_type="constant")
    assert [line["learning_rate"] for line in metrics(tmp_path / "run")] == [5e-4] * 4


def test_after_the_best_weights_are_loaded_the_numbers_are_those_that_a_reopened_run_gives(ternary, rows):
    run = ternary(eval_data=rows[:4], eval_steps=1, save_steps=1, load_best_model_at_end=True,
                  metric_for_best_model="eval_accuracy", greater_is_better=False)  # fmt: skip
    assert run.best_checkpoint.name != "step-00000004"
    again = ternary(eval_data=rows[:4], eval_steps=1, save_steps=1, load_best_model_at_end=True,
                    metric_for_best_model="eval_accuracy", greater_is_better=False)  # fmt: skip
    assert again.evaluate() == run.eval_metrics


class Stop:
    """A signal at the end of step 2, before its evaluation, which is then owed."""

    @luthier.event
    def step_ended(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_that_was_stopped_and_resumed_equals_an_undisturbed_one(ternary, rows, tmp_path, packing):
    shared = {"eval_data": rows[:4], "eval_steps": 1, "packing": packing}
    straight = ternary(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(Interrupted):
        ternary(**shared, exact_callbacks=["jsonl", Stop()])
    resumed = ternary(**shared)
    assert resumed.loss_history == straight.loss_history and resumed.eval_metrics == straight.eval_metrics
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "straight")  # of step 2 too
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_full_trains_the_latent_weights_and_the_artifact_holds_them(ternary, rows):
    run = ternary()
    assert run.loss_history[-1] < run.loss_history[0]
    note = json.loads((run.artifact / "luthier.json").read_text())
    assert note["artifact"] == "quantized" and note["progress"] == {
        "step": 4,
        "total_steps": 4,
        "epoch": pytest.approx(4 / 3),
    }
    assert not list(run.artifact.glob("model*.safetensors"))
    again = ternary()  # the finished run
    assert again._setup is None and again.evaluate(rows[:4]) == run.evaluate(rows[:4])


def test_a_merged_model_computes_what_the_trained_layers_compute(ternary):
    run = ternary(merge=True)
    ids = torch.arange(10, 22)[None]
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(run.merged)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, run.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


class ForgetsOne(Ternary):
    """Writes all layers but one, which is read back as zeros."""

    def save(self, model, folder):
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "layers.safetensors")

    def load(self, folder, model):
        state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        model.load_state_dict({**state, **load_file(folder / "layers.safetensors")})
        return model


def test_trained_layers_that_their_files_do_not_carry_are_refused_before_the_first_step(ternary, tmp_path):
    quantizer = ForgetsOne()
    with expect_error("artifact-uncarried", "adapter"):
        ternary(quantizer=quantizer)
    assert not (tmp_path / "run").exists()
    assert [told for told in quantizer.told if told != "run"][-1] == (0, 4)  # as before the first step


def test_the_layers_of_a_live_quantizer_stay_its_own_when_its_files_are_checked(ternary):
    quantizer = Ternary()
    run = ternary(quantizer=quantizer)
    assert {id(layer) for layer in quantizer.layers} <= {id(module) for module in run.model.modules()}


@pytest.mark.parametrize("kind", ["adapter", "quantizer"])
def test_a_merge_that_a_part_does_not_know_is_refused_before_anything_is_done(ternary, kind, tmp_path):
    from luthier.builtin.full import FullTuning
    from luthier.plugins.records import NoOptions

    adapter = FullTuning(NoOptions())
    parts = {"adapter": adapter, "quantizer": Ternary()}
    parts[kind].mergeable = False
    adapter.provides = ("trainable-weights",)
    with expect_error("artifact-unmergeable", "merge", kind) as caught:
        ternary(**parts, merge=True)
    assert (caught.value.code, caught.value.where) == ("artifact-unmergeable", "merge")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_merged_where_its_quantizer_cannot_be(ternary):
    run = ternary(quantizer=Ternary(mergeable=False))
    with expect_error("artifact-unmergeable"):
        run.merge()
    assert not (run.output_path / "merged").exists()


def test_apply_says_in_which_world_it_is(ternary, model_folder, rows):
    quantizer = Ternary()
    luthier.plan(model=str(model_folder), data=rows, adapter="full", quantizer=quantizer)
    assert quantizer.contexts == [("plan", False)]
    quantizer.contexts.clear()
    ternary(quantizer=quantizer)
    # the run, the check of its untrained artifact, and that of its artifact
    assert quantizer.contexts == [("train", True), ("open", False), ("open", False)]


def worlds(settings):
    quantizer = Ternary()
    losses = luthier.train(**settings, quantizer=quantizer).loss_history
    return [losses, [[purpose, has_values] for purpose, has_values in quantizer.contexts]]


def test_sharded_ranks_apply_it_without_weights_and_train_as_one_does(ternary, model_folder, rows, tmp_path):
    settings = {"model": str(model_folder), "data": rows, "output_dir": tmp_path / "sharded", "adapter": "full",
                "exact_callbacks": [], "global_batch_size": 8, "learning_rate": 1e-3, "max_steps": 3,
                "distributed": {"strategy": "fsdp"}, "memory_check": False}  # fmt: skip
    alone = ternary(max_steps=3).loss_history
    first, second = in_ranks(2, worlds, settings, joined=False)
    assert first[0] == second[0] == pytest.approx(alone, rel=1e-5)
    opened = [["open", False], ["open", True], ["open", False]]  # the first check, the whole model, its check
    assert first[1] == [["train", True], *opened]
    assert ["hollow", False] in second[1] and ["train", True] not in second[1]
