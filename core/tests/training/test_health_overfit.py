"""Overfitting one batch: the verdict, its causes, and that the user's run and model are left as they were."""

import contextlib
import json

import luthier
import pytest
import torch
from luthier.errors import LuthierError
from luthier.health.flow import FlowMeter, layer_of
from luthier.plugins.contracts.values import LossOutput
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer


@pytest.fixture
def overfit(model_folder, rows, tmp_path):
    """One batch of four rows on the tiny model, beside `tmp_path/run`."""

    def run(steps=30, **changes):
        settings = {"model": str(model_folder), "data": rows, "output_dir": tmp_path / "run", "learning_rate": 1e-2}
        return luthier.train(**{**settings, "global_batch_size": 4, **changes}, overfit_one_batch=steps)

    return run


@pytest.fixture(scope="module")
def sound(model_folder, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "run"
    settings = {"model": str(model_folder), "data": rows, "output_dir": folder, "learning_rate": 1e-2}
    return luthier.train(**settings, global_batch_size=4, overfit_one_batch=30), folder


def test_a_sound_model_learns_one_batch_by_heart(sound):
    found, folder = sound
    assert found.passed
    assert found.causes == []
    assert found.last_loss == found.losses[-1] <= 0.5 * found.losses[0] == 0.5 * found.first_loss
    assert found.output_path == folder.with_name("run-overfit")
    assert len(found.rows) == 4
    assert 0 < found.supervised_tokens < found.tokens


def test_true_means_a_hundred_steps_and_a_batch_that_is_known_ends_it_sooner(overfit):
    found = overfit(steps=True)
    assert found.passed
    assert 10 <= found.steps < 100
    assert found.last_loss <= 0.02 * found.first_loss


def test_its_folder_holds_the_report_and_the_users_holds_nothing(sound):
    found, folder = sound
    assert not folder.exists()
    report = json.loads((found.output_path / "overfit.json").read_text())
    assert report == json.loads(json.dumps(found.to_dict()))
    lines = [json.loads(line) for line in (found.output_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == found.losses
    names = {path.name for path in found.output_path.iterdir()}
    assert names == {"run.json", "recipe.yaml", "metrics.jsonl", "log.jsonl", "loss.png", "lock", "overfit.json"}


def test_what_the_trial_set_for_itself_is_given_back(overfit):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    overfit(steps=1, num_threads=2)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_a_second_trial_lies_beside_the_first(overfit, tmp_path):
    assert [overfit(steps=1).output_path for _ in range(2)] == [tmp_path / "run-overfit", tmp_path / "run-overfit-2"]


def test_the_run_of_the_same_recipe_is_not_disturbed_by_it(overfit, train, tmp_path):
    straight = train(output_dir=tmp_path / "straight")
    overfit(steps=3)
    assert train().loss_history == straight.loss_history


def test_a_model_that_was_handed_over_stays_as_it_is(overfit):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    overfit(model=(model, tokenizer), steps=5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == attention
    assert model.training


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param("full", id="a model's dropout", marks=pytest.mark.slow),
        pytest.param({"name": "lora", "r": 8, "lora_dropout": 0.5}, id="an adapter's beside it"),
    ],
)
def test_there_is_no_dropout_no_decay_and_no_schedule(overfit, tmp_path, adapter):
    drops = {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2", **drops)
    settings = {"model": str(folder), "adapter": adapter, "warmup_steps": 50, "lr_scheduler_type": "cosine"}
    still = overfit(**settings, learning_rate=0.0, steps=4)
    assert len(set(still.losses)) == 1
    decayed = overfit(**settings, optimizer={"name": "sgd", "weight_decay": 0.9}, learning_rate=1e-9, steps=4)
    assert decayed.losses == pytest.approx(still.losses, rel=1e-5)
    assert overfit(**settings, steps=4).losses[1] != still.losses[0]


def test_a_rate_of_zero_is_named_first(overfit):
    found = overfit(learning_rate=0.0, steps=6)
    assert not found.passed
    assert found.causes[0] == "the learning rate is 0: set learning_rate"


def test_a_rate_that_is_too_low_is_named(overfit):
    found = overfit(learning_rate=1e-9, steps=12, optimizer="sgd")
    assert not found.passed
    assert "raise learning_rate" in found.causes[0]
    assert found.flow
    assert max(flow.ratio for flow in found.flow) < 1e-6


def test_a_rate_that_is_too_high_is_named(overfit):
    found = overfit(learning_rate=3.0, steps=12, optimizer="sgd", max_grad_norm=None)
    assert not found.passed
    assert "too high" in found.causes[0] or "not finite" in found.causes[0]


def test_a_number_that_is_not_finite_is_traced(overfit):
    class Broken:
        data = "tokens"

        def terms(self, batch):
            return {"tokens": 1.0}

        def __call__(self, policy, batch):
            return LossOutput(sums={"tokens": policy.token_logprobs(batch).sum() * float("nan")})

    found = overfit(loss=Broken())
    assert not found.passed
    assert found.steps == 1
    assert "step 1 is not finite: every module's output is finite" in found.causes[0]
    report = json.loads((found.output_path / "overfit.json").read_text(), parse_constant=pytest.fail)
    assert report["losses"] == [None]


def test_labels_that_are_nearly_all_masked_are_named(overfit):
    ids = list(range(60, 200)) * 3
    rows = [{"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]} for _ in range(4)]
    found = overfit(data=rows, learning_rate=1e-7, steps=3)
    assert found.causes[0].startswith(f"only 8 of {4 * len(ids)} tokens are supervised")


def test_a_parameter_that_no_gradient_reaches_is_named(overfit):
    model = tiny_model()
    model.model.norm.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    for layer in model.model.layers:
        layer.requires_grad_(False)
    found = overfit(model=(model, tiny_tokenizer()), learning_rate=1e-6, steps=6)
    assert any("no gradient reaches model.norm.idle" in cause for cause in found.causes)


def test_an_optimizer_that_moves_nothing_is_named(overfit):
    class Idle:
        def build(self, groups):
            return torch.optim.SGD([{"params": [p for g in groups for p in g.parameters], "lr": 0.0, "lr_scale": 0.0}])

        def evaluating(self):
            return contextlib.nullcontext()

    found = overfit(optimizer=Idle(), steps=12)
    assert "the optimizer does not move it" in found.causes[0]


def test_nothing_trainable_is_refused_as_in_a_run(overfit):
    with pytest.raises(LuthierError) as caught:
        overfit(adapter={"name": "lora", "target_modules": []})
    assert caught.value.code == "train-nothing"


# gradient flow


def test_each_layers_flow_is_that_of_its_own_parameters(overfit):
    found = overfit(steps=3, optimizer={"name": "sgd"}, learning_rate=0.01, max_grad_norm=None)
    layers = {flow.layer: flow for flow in found.flow}
    assert list(layers) == ["model.embed_tokens", "layers.0", "layers.1", "model.norm", "lm_head"]
    assert sum(flow.parameters for flow in found.flow) == sum(p.numel() for p in tiny_model().parameters())
    for flow in found.flow:  # SGD's update is the rate times the gradient
        assert flow.update == pytest.approx(0.01 * flow.gradient, rel=1e-3)
        assert flow.ratio == pytest.approx(flow.update / flow.weight)


def test_clipping_does_not_hide_the_gradients_norm(overfit):
    free, clipped = (overfit(steps=1, max_grad_norm=limit, optimizer="sgd") for limit in (None, 1e-3))
    for one, other in zip(free.flow, clipped.flow, strict=True):
        assert other.gradient == pytest.approx(one.gradient, rel=1e-3)
        assert other.update < one.update


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layers.3"),
        ("transformer.h.11.attn.c_attn.lora_A.weight", "h.11"),
        ("model.layers.3.mlp.experts.7.down_proj.weight", "layers.3"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
    ],
)
def test_a_parameter_belongs_to_its_layer(name, layer):
    assert layer_of(name) == layer


def test_measuring_changes_nothing():
    from luthier.builtin.full import FullTuning
    from luthier.plugins.records import NoOptions
    from luthier.testing.contexts import context

    model = tiny_model()
    adapter = FullTuning(NoOptions())
    adapter.attach(model, context(model))
    before = [p.detach().clone() for p in model.parameters()]
    flows = FlowMeter(adapter).measure(1.0, None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(flow.gradient == flow.update == 0 for flow in flows)


def test_a_run_logs_each_layers_flow_where_it_is_due(train, tmp_path):
    plain = train(num_train_epochs=2, output_dir=tmp_path / "plain")
    run = train(num_train_epochs=2, gradient_flow_steps=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    due = [line["step"] for line in lines if "gradient/layers.0" in line]
    assert due == [2, 4, 6]
    for line in lines[1::2]:
        gradients = [value for name, value in line.items() if name.startswith("gradient/")]
        assert sum(g * g for g in gradients) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-4)
        assert all(line[f"update_ratio/{layer}"] > 0 for layer in ("layers.0", "layers.1", "lm_head"))
    assert run.loss_history == plain.loss_history


def test_a_flow_that_is_due_between_two_loggings_is_not_lost(train, tmp_path):
    train(num_train_epochs=2, gradient_flow_steps=2, logging_steps=3)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ["gradient/lm_head" in line for line in lines] == [True, True]
