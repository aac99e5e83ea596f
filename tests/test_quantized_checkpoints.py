"""Checkpoints that another tool has quantized, as a base: their layers compute what they hold, adapters train on them."""

import json

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.artifacts.dense_copy import merged_copy
from luthier.builtin.none import Unquantized
from luthier.model.attention import generating_attention
from luthier.model.weights.stored_layers import StoredLinear
from luthier.plugins.records import NoOptions
from luthier.testing.contexts import context
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_bitnet import Bitnet, save_packed
from luthier_bitnet.quantizer import TernaryQuantizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

ROWS = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(8)]
LORA = {"name": "lora", "r": 4, "target_modules": "all-linear"}
IDS = torch.arange(10, 30)[None]
BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
PACKED = ("divide", "multiply")
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Makes the folder of a checkpoint in a form, once; the weights [out, in] that it holds lie beside it by path."""
    made = {}

    def make(form):
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            made[form] = (folder, _save_bnb(folder, form) if form in BNB else _save_packed(folder, form))
            AutoTokenizer.from_pretrained(save_tiny_model(folder / "dense", **SIZES)).save_pretrained(folder)
        return made[form]

    return make


def _save_bnb(folder, form):
    dense = save_tiny_model(folder / "dense", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=BitsAndBytesConfig(**BNB[form]))
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    return {name: m.weight.detach().float() for name, m in plain.named_modules() if type(m) is torch.nn.Linear}


def _save_packed(folder, convention):
    model = tiny_model(**SIZES)
    part = TernaryQuantizer(Bitnet())
    part.apply(model, context(model))
    save_packed(model, folder, convention)
    return {name: m.dense() for name, m in model.named_modules() if part.dequantize(m) is not None}


def opened(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Unquantized(NoOptions()).apply(model, context(tiny_model()))


def train(folder, output, steps=2, **settings):
    given = {"adapter": LORA, "learning_rate": 1e-2, **settings}
    return luthier.train(model=str(folder), data=ROWS, max_steps=steps, output_dir=output, **given)


@pytest.mark.parametrize("form", [*BNB, *PACKED])
def test_every_quantized_layer_opens_to_the_weight_that_the_checkpoint_holds(stored, form):
    folder, weights = stored(form)
    layers = {name: m for name, m in opened(folder).named_modules() if isinstance(m, StoredLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dense(), weights[name], rtol=1e-2, atol=1e-6)
        assert layer.weight.numel() * layer.weight.element_size() <= weights[name].numel()


@pytest.mark.parametrize("form", [*BNB, *PACKED])
def test_values_and_gradients_are_those_of_the_weight_also_after_a_pass_without_gradient(stored, form):
    layer = opened(stored(form)[0]).model.layers[0].mlp.down_proj.eval()
    states = torch.randn(5, 128)
    with torch.no_grad():
        layer(states[:1])  # where bitsandbytes' own layer takes another layout
    states.requires_grad_()
    made, seen = layer(states), states.detach()
    if form in PACKED:
        steps = seen.abs().amax(-1, keepdim=True) / 127
        seen = (seen / steps).round() * steps
    torch.testing.assert_close(made, seen @ layer.dense().T, rtol=1e-4, atol=1e-4)
    sent = torch.randn(5, 64)
    made.backward(sent)
    torch.testing.assert_close(states.grad, sent @ layer.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "form", ["nf4", "multiply", *(pytest.param(f, marks=pytest.mark.slow) for f in ("int8", "divide"))]
)
def test_lora_trains_resumes_bit_for_bit_and_reopens(stored, tmp_path, form):
    def break_off(step):
        if step == 2:
            raise RuntimeError("power cut")

    folder = stored(form)[0]
    straight = train(folder, tmp_path / "straight", steps=4, save_steps=1)
    assert straight.loss_history[-1] < straight.loss_history[0]
    with pytest.raises(RuntimeError, match="power cut"):
        train(folder, tmp_path / "run", steps=4, save_steps=1, exact_callbacks=[luthier.on(step_ended=break_off)])
    resumed = train(folder, tmp_path / "run", steps=4, save_steps=1)
    assert resumed.loss_history == straight.loss_history
    model = luthier.load(resumed.artifact).model
    for made in (model, resumed.model):
        made.eval()
    torch.testing.assert_close(logits(model), logits(resumed.model), rtol=0, atol=1e-5)


def logits(model):
    with generating_attention(model):
        return model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits.detach()


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_merged_model_is_dense_and_gives_the_same_logits(stored, tmp_path, form):
    run = train(stored(form)[0], tmp_path / "run")
    folder = luthier.merge(run.output_path)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(run.model.eval()), rtol=1e-3, atol=1e-3)
    with pytest.raises(LuthierError) as caught:
        luthier.merge(run.output_path, tmp_path / "other", onto="original")
    assert (caught.value.code, caught.value.where) == ("artifact-unmergeable", "onto")


def test_what_rounds_activations_is_not_merged_into_layers_that_do_not(stored, tmp_path):
    run = train(stored("divide")[0], tmp_path / "run", steps=1)
    with pytest.raises(LuthierError) as caught:
        luthier.merge(run.output_path)
    assert caught.value.code == "artifact-unmergeable"


@pytest.mark.parametrize("form", ["nf4", "int8", "divide", "multiply"])
def test_a_plan_holds_the_codes_and_not_dense_weights(stored, tmp_path, form):
    folder = stored(form)[0]
    planned = [luthier.plan(model=str(m), data=ROWS, adapter=LORA, max_steps=1) for m in (folder, folder / "dense")]
    held = [plan.memory["weights"] for plan in planned]
    assert held[0] < 0.7 * held[1] if form in BNB else held[0] < 1.2 * held[1]


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"adapter": "full"}, "part-incompatible", ("model",)),
        ({"quantizer": "nf4"}, "part-unsupported", ("bitsandbytes",)),
        ({"quantizer": "ternary"}, "part-unsupported", ("bitsandbytes",)),
    ],
)
def test_full_training_and_a_second_quantizer_are_refused(stored, tmp_path, settings, code, words):
    with pytest.raises(LuthierError) as caught:
        train(stored("nf4")[0], tmp_path / "run", **settings)
    assert all(fact in str(caught.value) for fact in words)
    assert caught.value.code == code
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_stored_layer_takes_no_other_weight_and_moves_keep_its_scales(stored):
    model = opened(stored("nf4")[0])
    layer = model.model.layers[0].mlp.up_proj
    before = layer.dense()
    model.bfloat16()
    assert torch.equal(layer.dense(), before)
    with pytest.raises(LuthierError) as caught:
        Unquantized(NoOptions()).requantize(layer, before)
    assert caught.value.code == "part-unsupported"
    assert type(merged_copy(model, None, Unquantized(NoOptions())).model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_codes_that_are_stored_as_another_dtype_are_no_damage(tmp_path):
    """As FSDP wants them: their bytes read as bfloat16 may be NaN."""
    dense = save_tiny_model(tmp_path / "dense", **SIZES)
    stored_as = {**BNB["fp4"], "bnb_4bit_quant_storage": torch.bfloat16}
    config = BitsAndBytesConfig(**stored_as)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "base")
    assert train(tmp_path / "base", tmp_path / "run").steps > 0
