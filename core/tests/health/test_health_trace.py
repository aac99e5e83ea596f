"""The trace names the first module, parameter, row or loss that made a number that is not finite, and costs nothing else."""

import math
import re

import luthier
import pytest
import torch
from luthier.errors import LuthierError
from luthier.model.nonfinite import SHOWN, Finding, describe_nonfinite
from luthier.plugins.contracts.values import LossOutput
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from torch import nn

LORA = {"name": "lora", "r": 2}
POISON = "#"  # stands in one row of `marked`


class Poisoned(nn.Module):
    """A module that gives `value` at the tokens that are the poison."""

    def __init__(self, inner, token, value=math.nan):
        super().__init__()
        self.inner, self.token, self.value = inner, token, value
        self.weight = inner.weight

    def forward(self, ids):
        return torch.where((ids == self.token)[..., None], self.value, self.inner(ids))


class Steep(nn.Module):
    """The inner module; its value is left as it is, and its gradient is NaN."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states) + (states * 0).sqrt() * 0


class Overflowing(nn.Module):
    """The inner module, times what its dtype cannot hold, in training alone: the comparison before it stays whole."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states) * (3e38 if torch.is_grad_enabled() else 1.0) * 4


class Failures:
    """A callback that keeps what failed."""

    def __init__(self):
        self.seen = []

    @luthier.event
    def failed(self, error):
        self.seen.append(error)


class Scaled:
    """The usual loss times a factor."""

    data = "tokens"

    def __init__(self, factor):
        self.factor = factor

    def terms(self, batch):
        return {"scaled": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        return LossOutput(sums={"scaled": -policy.token_logprobs(batch).sum() * self.factor})


@pytest.fixture
def world():
    return tiny_model(), tiny_tokenizer()


@pytest.fixture
def marked(tmp_path, rows):
    """Twelve rows in a file, the eighth with the poison in its question."""
    import json

    path = tmp_path / "rows.jsonl"
    held = [json.loads(json.dumps(row)) for row in rows[:12]]
    held[7]["messages"][0]["content"] += POISON
    path.write_text("".join(json.dumps(row) + "\n" for row in held))
    return path


def poison_of(tokenizer):
    return tokenizer.convert_tokens_to_ids(POISON)


@pytest.fixture
def refused(train, world):
    """The error of a run on the world's model; every micro-batch holds about one row."""

    def run(**changes):
        usual = {"model": world, "max_tokens_per_device": 64, "lr_scheduler_type": "constant"}
        settings = {**usual, "adapter": LORA, **changes}  # a whole model's files could not carry the modules put in
        with pytest.raises(LuthierError) as caught:
            train(**settings)
        assert caught.value.code == "train-nonfinite"
        return caught.value

    return run


def overflow(model):
    """A layer of the model that overflows where it trains."""
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Overflowing(mlp.down_proj)


def test_a_layer_whose_product_overflows_is_named_with_its_inputs_and_the_dtype(refused, world):
    overflow(world[0])
    error = refused()
    facts = ("step 1:", "model.layers.1.mlp.down_proj (Overflowing)", "inf,", "3.4e+38", "micro-batch 1")
    assert error.code == "train-nonfinite" and [fact for fact in facts if fact not in error.problem] == []


def test_a_base_model_that_gives_no_numbers_is_refused_before_the_first_step(refused, world, tmp_path):
    world[0].model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    error = refused()
    assert (error.code, error.where) == ("train-nonfinite", "model")
    assert "model.layers.1.mlp.down_proj (Linear)" in error.problem
    assert "base model's files" in error.remedy
    assert not (tmp_path / "run").exists()


def test_a_weight_of_the_base_that_is_none_is_named_before_training(train, world):
    world[0].model.layers[0].self_attn.q_proj.weight.data[3, :2] = math.nan
    with pytest.raises(LuthierError) as caught:
        train(model=world)
    assert caught.value.code == "model-weights"
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value)


def test_a_weight_that_training_broke_is_named(refused, world):
    def damage(step):
        if step == 1:
            world[0].model.norm.weight.data[3] = math.inf

    error = refused(exact_callbacks=[luthier.on(step_ended=damage)])
    assert "step 2:" in error.problem and "model.norm.weight" in error.problem
    assert "damaged before this step" in error.remedy


def test_the_row_whose_token_began_it_is_named_alone_by_file_and_line(refused, world, marked):
    world[0].set_input_embeddings(Poisoned(world[0].get_input_embeddings(), poison_of(world[1])))
    error = refused(data=marked, global_batch_size=12, max_tokens_per_device=4096)
    assert error.where == f"{marked}:8"
    assert "model.embed_tokens (Poisoned) gave" in error.problem
    assert "NaN" in error.problem


def test_the_micro_batch_of_the_row_is_named(refused, world, marked):
    world[0].set_input_embeddings(Poisoned(world[0].get_input_embeddings(), poison_of(world[1])))
    error = refused(data=marked, global_batch_size=12, packing=False)
    number, of = error.problem.rpartition("in micro-batch ")[2].split(" of ")
    assert 1 <= int(number) <= 12
    assert int(of) == 12


def test_a_backward_that_breaks_where_forward_is_whole_is_named(refused, world):
    layer = world[0].model.layers[0]
    layer.post_attention_layernorm = Steep(layer.post_attention_layernorm)
    error = refused()
    assert "gradient" in error.problem and "model.layers.0.post_attention_layernorm" in error.problem
    assert re.search("loss[ ]nan", error.problem) is None


def test_a_gradient_that_breaks_between_modules_names_the_module_around_them(refused, world):
    attention = world[0].model.layers[1].self_attn
    plain = attention.forward

    def forward(hidden_states, **arguments):
        output, *rest = plain(hidden_states, **arguments)
        return (output + (output.detach() * 0 + (output * 0).sqrt()) * 0, *rest)

    attention.forward = forward
    error = refused(adapter="full")
    assert "gradient" in error.problem and "model.layers.1.self_attn" in error.problem


@pytest.mark.parametrize(
    ("factor", "told"), [(math.nan, ("data[22], data[10], data[21]",)), (math.inf, ("data[22], data[10], data[21]",))]
)
def test_a_loss_that_is_not_finite_over_finite_modules_is_named(refused, factor, told):
    assert all(fact in str(refused(loss=Scaled(factor))) for fact in told)


def test_gradients_that_are_finite_and_too_large_together_are_told_apart(refused):
    error = refused(loss=Scaled(1e25), max_grad_norm=None)
    assert error.code == "train-nonfinite" and "float32" in error.problem and "model." not in error.problem


def test_what_chance_made_is_found_by_the_same_chance(refused, world):
    class Chancy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            chance = torch.rand(()) if torch.is_grad_enabled() else 1.0
            return self.inner(states) * (math.nan if chance < 0.2 else 1.0)

    layer = world[0].model.layers[1]
    layer.input_layernorm = Chancy(layer.input_layernorm)
    error = refused(packing=False)
    assert "model.layers.1.input_layernorm (Chancy) gave" in error.problem


def test_a_loss_that_couples_the_batch_is_traced_too(refused, world, marked):
    class Coupled(Scaled):
        couples = "batch"

        def terms(self, batch):
            return {"coupled": float(batch.num_documents)}

        def scores(self, policy, batch):
            return batch.sum_by_document(policy.token_logprobs(batch)), {}

        def combine(self, scores, fixed):
            return LossOutput(sums={"coupled": scores.mean() ** 2 * len(scores)})

    world[0].set_input_embeddings(Poisoned(world[0].get_input_embeddings(), poison_of(world[1])))
    error = refused(loss=Coupled(1.0), data=marked, global_batch_size=12, max_tokens_per_device=4096)
    assert "model.embed_tokens" in error.problem
    assert error.where == f"{marked}:8"


def test_the_model_is_left_without_a_hook_and_without_a_gradient(refused, world):
    overflow(world[0])
    before = {name: p.detach().clone() for name, p in world[0].named_parameters()}
    refused()
    for module in world[0].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, parameter in world[0].named_parameters():
        assert parameter.grad is None
        assert not parameter._backward_hooks
        assert "lora" in name or torch.equal(parameter, before[name.replace(".base_layer", "")])


def test_adapters_and_checkpointed_layers_are_traced_alike(refused, world):
    overflow(world[0])
    error = refused(gradient_checkpointing=True, adapter={"name": "lora", "r": 2})
    assert "model.layers.1.mlp.down_proj" in error.problem


def test_what_a_callback_sees_before_the_failure_is_a_whole_run(train, world, tmp_path):
    from luthier.runs.writing.record import read_record

    overflow(world[0])
    failures = Failures()
    with pytest.raises(LuthierError):
        train(model=world, adapter=LORA, exact_callbacks=[failures])
    assert failures.seen[0].code == "train-nonfinite"
    [remark] = read_record(tmp_path / "run")["health"]["remarks"]
    assert remark["kind"] == "nonfinite"
    assert remark["place"] == "model.layers.1.mlp.down_proj"
    assert remark["loss"] == "nan"


@pytest.mark.parametrize("count", [0, 1, SHOWN, SHOWN + 2])
def test_an_error_names_the_first_rows_and_counts_the_others(count):
    finding = Finding(cause="forward", place="x", told="y", where=tuple(f"f:{i}" for i in range(count)))
    assert finding.rows == {
        0: None,
        1: "f:0",
        SHOWN: "f:0, f:1, f:2",
        SHOWN + 2: "f:0, f:1, f:2 and 2 more rows",
    }.get(count)


@pytest.mark.parametrize(
    ("values", "dtype", "told"),
    [
        ([math.nan, 1.0, math.nan], torch.float32, "2 NaN"),
        ([math.inf, 1.0], torch.float16, "1 inf, beyond the largest float16, 6.55e+04"),
        ([-math.inf, math.nan], torch.bfloat16, "1 NaN and 1 inf, beyond the largest bfloat16, 3.39e+38"),
    ],
)
def test_the_kind_of_number_is_told_with_the_range_of_its_dtype(values, dtype, told):
    assert describe_nonfinite(torch.tensor(values, dtype=dtype)) == told


def test_a_gradient_that_overflows_float16_at_every_scale_is_explained_once(world, rows, tmp_path, capsys):
    from luthier.health.monitor import IN_A_ROW, Health
    from luthier.precision.loss_scaler import LossScaler
    from luthier.recipe.gather_arguments import gather_arguments
    from luthier.step.update import update_weights
    from luthier.training.assemble import assemble_run
    from luthier.training.loop import trace_target

    layer = world[0].model.layers[0]
    layer.post_attention_layernorm = Steep(layer.post_attention_layernorm)
    setup = assemble_run(
        *gather_arguments({}, world, None, rows, None, {"num_train_epochs": 9.0, "global_batch_size": 8})
    ).setup
    setup.precision.scaler = LossScaler()
    health = Health(setup.recipe, setup.adapter, setup.rates.peak, trace_target(setup))
    for step, portion in enumerate(setup.feed.portions(0), 1):
        health.see(step, update_weights(setup, step - 1, portion), portion.examples)
        told = capsys.readouterr().err
        assert ("overflows float16 at one scale after the other" in told) == (step == IN_A_ROW)
        if step == IN_A_ROW:
            assert "post_attention_layernorm" in told
        if step == IN_A_ROW + 2:
            break
    assert [remark["kind"] for remark in health.remarks] == ["overflow"]
    assert health.skipped == 0
