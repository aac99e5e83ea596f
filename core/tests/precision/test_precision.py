"""Precision: chosen by rule, close to float32, small where it should be, and gone without a trace after the run."""

import luthier
import pytest
import torch
from luthier.errors import LuthierError
from luthier.hardware import low_precision as arithmetic
from luthier.precision import dtypes as precision
from luthier.precision import weight_dtypes as storage
from luthier.precision.dtypes import Facts, Precision, choose
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record, write_record
from luthier.step.context import dense_weight
from luthier.step.module import Step
from luthier.testing import expect_error
from luthier.testing.worlds import random_batch, tiny_model, tiny_tokenizer
from luthier.training.assemble import assemble_run
from torch import nn

LORA = {"name": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
BF16 = [
    {"precision": "bf16"},
    {"precision": "pure_bf16"},
    {"precision": "pure_bf16", "pure_bf16_update": "float32_masters"},
]
IDS = ["bf16", "stochastic", "masters"]
COMBINED = [  # two of the six always, the rest where time is no matter
    pytest.param("full", BF16[1], id="full-stochastic"),
    pytest.param(LORA, BF16[0], id="lora-bf16"),
    *(pytest.param(LORA, BF16[i], id=f"lora-{IDS[i]}", marks=pytest.mark.slow) for i in (1, 2)),
    *(pytest.param("full", BF16[i], id=f"full-{IDS[i]}", marks=pytest.mark.slow) for i in (0, 2)),
]
PLAIN = {"device": "cpu", "feature": "avx512_bf16", "hidden": 4096, "trains": torch.float32, "weights": torch.float32}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "bf16"),
        ({"device": "cuda", "feature": "a GPU", "hidden": 32}, "bf16"),
        ({"device": "cuda", "feature": None}, "float32"),
        ({"feature": None}, "float32"),
        ({"hidden": 144}, "float32"),
        ({"device": "mps"}, "float32"),
        ({"weights": torch.float64, "trains": torch.float64}, "float64"),
        ({"weights": torch.bfloat16}, "bf16"),
        ({"weights": torch.bfloat16, "trains": torch.bfloat16}, "pure_bf16"),
        ({"weights": torch.bfloat16, "trains": torch.bfloat16, "sharded": True}, "bf16"),
        ({"weights": torch.bfloat16, "feature": None, "hidden": 32}, "bf16"),
        ({"weights": torch.float16, "trains": torch.float16}, "bf16"),
    ],
)
def test_auto_is_a_rule_on_device_width_and_dtypes(changed, expected):
    name, reason = choose(Facts(**{**PLAIN, **changed}))
    assert name == expected
    assert reason


def test_the_processors_flags_are_read_from_the_system(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert arithmetic.processor_flags(tmp_path / "cpuinfo") >= {"avx512_bf16"}
    assert "bf16" in arithmetic.processor_flags(tmp_path / "arm")
    assert arithmetic.processor_flags(tmp_path / "absent") == frozenset()


def test_what_was_chosen_is_recorded_with_its_reason_and_holds_on_resume(train, tmp_path, processor):
    processor("avx512_bf16")
    with pytest.raises(Interrupted):
        train(exact_callbacks=[luthier.on(step_ended=_signal)])
    record = read_record(tmp_path / "run")
    held = record["decisions"]["precision"]
    assert held["value"] == "float32"
    assert "hidden size 32" in held["reason"]
    held.update(value="bf16", reason="another machine said so")
    write_record(tmp_path / "run", record)
    assert train()._setup.precision.name == "bf16"


def test_re_decide_asks_again(train, tmp_path):
    with pytest.raises(Interrupted):
        train(exact_callbacks=[luthier.on(step_ended=_signal)])
    record = read_record(tmp_path / "run")
    record["decisions"]["precision"]["value"] = "bf16"
    write_record(tmp_path / "run", record)
    assert train(re_decide=True)._setup.precision.name == "float32"
    assert read_record(tmp_path / "run")["decisions"]["precision"]["value"] == "float32"


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"precision": "fp16"}, "precision"),
        ({"precision": "bf16", "model": {"dtype": "float64"}}, "precision"),
        ({"precision": "float32", "model": {"dtype": "float64"}}, "precision"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_appears(train, tmp_path, model_folder, settings, where):
    settings = {**settings, "model": {"name_or_path": str(model_folder), **settings.get("model", {})}}
    with pytest.raises(LuthierError) as caught:
        train(**settings)
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", where)
    assert not (tmp_path / "run").exists()


def test_sharded_weights_are_not_stepped_in_bfloat16():
    with expect_error("recipe-conflict", "precision"):
        precision.refuse_precision("pure_bf16", torch.device("cpu"), sharded=True)


@pytest.mark.parametrize(("adapter", "settings"), COMBINED)
def test_thirty_steps_end_within_a_hundredth_of_float32s_loss(train, tmp_path, adapter, settings):
    shared = {"adapter": adapter, "max_steps": 30, "learning_rate": 3e-3, "save_final": False}
    exact = train(**shared, precision="float32", output_dir=tmp_path / "exact")
    low = train(**shared, **settings, output_dir=tmp_path / "low")
    assert low.loss_history != exact.loss_history
    assert low.final_loss == pytest.approx(exact.final_loss, rel=0.01)
    assert exact.final_loss < 0.9 * exact.loss_history[0]


def given(seed=0, dtype=torch.float32, **settings):
    """A `Setup` on a loaded model, and that model."""
    model = tiny_model(seed=seed).to(dtype)
    recipe = Recipe.from_dict({"model": "python:tiny", "data": "python:rows", "global_batch_size": 4, **settings})
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(8)]
    return assemble_run(recipe, Objects(model=model, tokenizer=tiny_tokenizer(), data=rows)).setup, model


def copies(model):
    return {name: (p, p.dtype, p.detach().clone()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [*BF16, {"precision": "float32"}], ids=[*IDS, "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_given_back_as_it_came_to_the_bit(settings, dtype):
    model = tiny_model().to(dtype)
    model.requires_grad_(False)
    trained = [p.requires_grad_() for p in model.model.layers[0].parameters()]
    before = copies(model)
    with Precision(name=settings["precision"], keeps_masters="pure_bf16_update" in settings).held(model, trained):
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert frozen == {torch.float32 if settings["precision"] == "float32" else torch.bfloat16}
        assert {p.dtype for p in trained} == {torch.bfloat16 if "pure" in settings["precision"] else torch.float32}
    for name, parameter in model.named_parameters():
        same, came, value = before[name]
        assert parameter is same
        assert parameter.dtype is came
        exact = settings["precision"] != "pure_bf16" or not parameter.requires_grad or "pure_bf16_update" in settings
        expected = value if exact else value.to(torch.bfloat16).to(came)
        assert torch.equal(parameter.detach(), expected)


def test_a_float64_model_is_left_alone():
    setup, model = given(dtype=torch.float64)
    assert setup.precision.name == "float64"
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("settings", BF16, ids=IDS)
def test_products_are_in_bfloat16_and_the_residual_stream_with_them(settings):
    for adapter in ("full", LORA):
        setup, model = given(**settings, adapter=adapter)
        seen = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or "norm" in name or name.endswith(("embed_tokens", "layers.1")):
                module.register_forward_hook(lambda m, i, o, n=name: seen.update({n: o.dtype}))
        setup.step(random_batch())
        assert len(seen) > 10
        assert set(seen.values()) == {torch.bfloat16}
        setup.undo.close()


@pytest.mark.parametrize("settings", BF16, ids=IDS)
def test_gradients_are_added_in_float32(settings):
    setup, _ = given(**settings)
    output = setup.step(random_batch())
    sum(output.sums.values()).backward()
    assert {p.grad.dtype for g in setup.optimizer.param_groups for p in g["params"]} == {torch.float32}
    setup.undo.close()


@pytest.mark.parametrize(("name", "expected"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_a_companion_is_held_in_the_dtype_of_products(name, expected):
    model, computed = tiny_model().requires_grad_(False), Precision(name=name)
    batch, before = torch.arange(8)[None], tiny_model()
    computed.lower_companion(model)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    with torch.no_grad(), computed.computing():
        torch.testing.assert_close(model(batch).logits, before(batch).logits, rtol=0.05, atol=0.05)


def test_frozen_weights_take_no_more_room_and_half_where_they_were_published_in_bfloat16():
    def sizes(rounded):
        model = tiny_model()
        if rounded:
            model.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
        model.requires_grad_(False)
        found = Precision(name="bf16")
        with found.held(model, []):
            return sum(p.nbytes for p in model.parameters()), sum(rest.nbytes for rest in found.kept)

    whole = sum(p.nbytes for p in tiny_model().parameters())
    low, kept = sizes(False)
    assert low == whole // 2
    norms = sum(p.nbytes for n, p in tiny_model().named_parameters() if "norm" in n)
    assert kept == (whole - norms) // 2  # a norm's ones are exact
    assert sizes(True) == (whole // 2, 0)


@pytest.mark.parametrize("kind", ["quantized", "kept", "infinite"])
def test_weights_that_are_no_plain_weights_are_left_alone(kind):
    class Codes(nn.Linear):
        """A layer of a quantizer's."""

    model = tiny_model().requires_grad_(False)
    projection = model.model.layers[0].mlp.down_proj
    if kind == "quantized":
        projection.__class__ = Codes
    elif kind == "kept":
        model._keep_in_fp32_modules_strict = {"down_proj"}
        assert not any(
            "down_proj" in n
            for n, p in model.named_parameters()
            if p in set(storage.frozen_weights(model, torch.bfloat16))
        )
        return
    else:
        projection.weight[0, 0] = float("nan")
    with Precision(name="bf16").held(model, []):
        assert projection.weight.dtype is torch.float32
        assert model.model.layers[1].mlp.down_proj.weight.dtype is torch.bfloat16


def test_a_context_gives_and_takes_whole_weights_while_they_are_held():
    setup, model = given(adapter=LORA, precision="bf16")
    layer = model.model.layers[0].mlp.down_proj.base_layer
    exact = tiny_model().model.layers[0].mlp.down_proj.weight.detach()
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(dense_weight(layer, setup.quantizer), exact)
    assert torch.equal(setup.context.dequantize(layer), exact)
    setup.context.requantize(layer, exact * 1.001)
    assert torch.equal(setup.context.dequantize(layer), exact * 1.001)
    setup.undo.close()
    assert torch.equal(layer.weight.detach(), exact * 1.001)


def test_a_merged_model_is_the_float32_base_and_the_update(train, tmp_path):
    from safetensors.torch import load_file

    base, model = tiny_model().state_dict(), tiny_model()
    run = train(model=(model, tiny_tokenizer()), adapter=LORA, precision="bf16", merge=True, max_steps=4)
    merged = load_file(run.merged / "model.safetensors")
    updates = load_file(run.artifact / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (updates[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    scale = run.model.get_submodule(name).scale
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + scale * b @ a, rtol=1e-6, atol=1e-7)
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert all(
        torch.equal(p, base[n.replace(".base_layer", "")]) for n, p in model.named_parameters() if not p.requires_grad
    )


@pytest.mark.parametrize("stop", ["failure", "signal"])
def test_the_callers_model_comes_back_however_the_run_ends(train, stop):
    class Broken:
        @luthier.event
        def step_ended(self, run, step):
            if stop == "failure":
                raise ValueError("broken")
            run.control.signal = 15

    model = tiny_model()
    before, threads = copies(model), torch.get_num_threads()
    with pytest.raises((ValueError, Interrupted)):
        train(
            model=(model, tiny_tokenizer()), adapter=LORA, precision="bf16", exact_callbacks=[Broken()], num_threads=2
        )
    found = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora" not in n}
    assert all(torch.equal(found[n], value) and found[n].dtype is came for n, (_, came, value) in before.items())
    assert torch.get_num_threads() == threads
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("adapter", "settings"), COMBINED)
def test_a_resumed_run_equals_a_straight_run_bit_for_bit(train, tmp_path, adapter, settings):
    shared = {"adapter": adapter, "num_train_epochs": 2, **settings}
    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=["jsonl", luthier.on(step_ended=_signal)])
    resumed = train(**shared)
    assert resumed.loss_history == straight.loss_history
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def _signal(run, step):
    run.control.signal = 15 if step == 2 else None


@pytest.mark.parametrize("settings", BF16, ids=IDS)
def test_the_best_weights_are_those_that_are_saved(train, rows, settings):
    run = train(
        **settings, eval_data=rows[:4], eval_steps=1, load_best_model_at_end=True, learning_rate=0.2, max_steps=4
    )
    assert run.evaluate()["eval_loss"] == pytest.approx(run.eval_loss, rel=0.02)


@pytest.mark.parametrize("settings", [{"precision": "float32"}, *BF16], ids=["float32", *IDS])
def test_evaluation_after_the_run_is_that_of_the_run(train, rows, settings):
    run = train(**settings, adapter=LORA, eval_data=rows[:4], max_steps=3)
    bound = 1e-6 if settings["precision"] in ("bf16", "float32") else 5e-3  # stepped weights are wider after the run
    assert run.evaluate()["eval_loss"] == pytest.approx(run.eval_loss, rel=bound)


@pytest.mark.parametrize("settings", BF16, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_in_bfloat16_is_saved_in_the_dtype_that_the_model_came_in(train, settings, dtype):
    from safetensors.torch import load_file

    model = tiny_model().to(dtype)
    run = train(model=(model, tiny_tokenizer()), **settings, max_steps=1)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {t.dtype for t in load_file(run.artifact / "model.safetensors").values()} == {dtype}


def test_the_step_and_evaluation_run_inside_the_precision():
    seen = []

    class Loss:
        data = "tokens"

        def terms(self, batch):
            return {"loss": 1.0}

        def __call__(self, policy, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return luthier.LossOutput(sums={"loss": policy.token_logprobs(batch).sum()})

    setup, model = given(precision="bf16")
    Step(model, setup.adapter, Loss(), computing=setup.precision.computing)(random_batch())
    Step(model, setup.adapter, Loss())(random_batch())
    assert seen == [True, False]
    setup.undo.close()


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {}])
def test_where_the_processor_only_imitates_bfloat16_that_is_said(train, model_folder, processor, capsys, settings):
    for flags, told in (((), True), (("avx512_bf16",), False)):
        processor(*flags)
        train(model={"name_or_path": str(model_folder), "dtype": "bfloat16"}, fresh=True, max_steps=1, **settings)
        assert ("many times faster" in capsys.readouterr().err) == told
