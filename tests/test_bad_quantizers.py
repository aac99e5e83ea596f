"""Bad input to quantizers and exports: each is refused by name before work starts, and nothing is left that looks whole."""

import json
import shutil

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.cli.app import app
from luthier.plugins.registry import installed_plugins
from luthier.testing.contexts import context
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_bitnet import Bitnet, save_packed
from luthier_bitnet.quantizer import TernaryQuantizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

ROWS = [{"prompt": f"{i}?", "completion": "yes"} for i in range(8)]
LORA = {"name": "lora", "r": 4, "target_modules": "all-linear"}
ODD = {"hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10}
FROZEN = ("nf4", "fp4", "bnb.nf4", "bnb.fp4", "bnb.int8", "int8", "torchao.int8", "torchao.int4")
TRAINED = ("ternary", "bitnet", "qat", "qat_activations")
EMULATED = {"name": "torchao.float8", "emulate": True}
CALIBRATED = {"name": "qat_activations", "online_calibration": True, "activation_granularity": "tensor"}
GROUPED = {"name": "ternary", "granularity": "group", "group_size": 16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder with a base of each kind: whole ones, one of odd sizes, damaged ones, and quantized ones."""
    folder = tmp_path_factory.mktemp("bases")
    dense = save_tiny_model(folder / "dense", hidden_size=64, intermediate_size=128)
    save_tiny_model(folder / "odd", **ODD)
    save_tiny_model(folder / "gpt2", "gpt2")
    for name, value in (("nan", float("nan")), ("infinite", float("inf"))):
        model = AutoModelForCausalLM.from_pretrained(dense)
        model.model.layers[1].mlp.up_proj.weight.data[1, 2] = value
        model.save_pretrained(folder / name)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(folder / "bnb")
    model = tiny_model(hidden_size=64, intermediate_size=128)
    save_packed(TernaryQuantizer(Bitnet()).apply(model, context(model)), folder / "packed")
    for name in ("nan", "infinite", "bnb", "packed"):
        AutoTokenizer.from_pretrained(dense).save_pretrained(folder / name)
    luthier.train(model=str(dense), data=ROWS, adapter="full", quantizer="ternary", max_steps=1, learning_rate=1e-3,
                  output_dir=folder / "ternary")  # fmt: skip
    return folder


def settings_of(base, quantizer):
    name = quantizer if isinstance(quantizer, str) else quantizer["name"]
    adapter = "full" if name in (*TRAINED, "torchao.float8") else LORA
    return {"model": str(base), "quantizer": quantizer, "adapter": adapter, "data": ROWS, "max_steps": 2,
            "learning_rate": 1e-3}  # fmt: skip


@pytest.mark.parametrize("quantizer", [*FROZEN, *TRAINED, GROUPED], ids=str)
def test_a_width_that_no_block_divides_is_padded_and_comes_back_in_its_own_shape(quantizer):
    model = tiny_model(**ODD)
    dense = {path: m.weight.detach().clone() for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    name, options = (quantizer, {}) if isinstance(quantizer, str) else (quantizer["name"], dict(quantizer))
    options.pop("name", None)
    offer = next(o for o in installed_plugins().offers("quantizer") if o.record.name == name)
    part = installed_plugins().build(offer, offer.record.options(**options))
    part.apply(model, context(model))
    opened = {path: part.dequantize(m) for path, m in model.named_modules() if part.dequantize(m) is not None}
    assert len(opened) == 14
    for path, weight in opened.items():
        assert weight.shape == dense[path].shape
        assert (weight - dense[path]).norm() < 0.7 * dense[path].norm()


# base, quantizer, code, place, whether a plan, which reads no weights, knows it too
REFUSED = [
    ("odd", EMULATED, "part-unsupported", "model.layers.0.self_attn.q_proj", True),
    *(("bnb", quantizer, "part-unsupported", "quantizer", True) for quantizer in ("nf4", "bnb.nf4", "torchao.int8")),
    ("bnb", "ternary", "part-unsupported", "quantizer", True),
    ("packed", "nf4", "part-unsupported", "quantizer", True),
    ("packed", "bitnet", "part-unsupported", "quantizer", True),
    ("ternary/model", "nf4", "recipe-conflict", "quantizer", True),
    ("ternary/model", GROUPED, "recipe-conflict", "quantizer", True),
    ("dense", {"name": "ternary", "schedule": {"start_epoch": 2, "end_epoch": 1}}, "recipe-conflict",
     "quantizer.schedule.end_epoch", True),
    ("dense", {"name": "qat", "schedule": {"start_step": 3, "end_step": 1}}, "recipe-conflict",
     "quantizer.schedule.end_step", True),
    ("dense", CALIBRATED, "recipe-conflict", "quantizer.calibration_samples", True),
    ("dense", {**CALIBRATED, "calibration_samples": 57}, "recipe-conflict", "quantizer.calibration_samples", True),
    *(("nan", quantizer, "model-weights", "{base}", False) for quantizer in (*FROZEN, *TRAINED, EMULATED)),
    ("infinite", "nf4", "model-weights", "{base}", False),
    ("infinite", "ternary", "model-weights", "{base}", False),
]  # fmt: skip


@pytest.mark.parametrize(("base", "quantizer", "code", "place", "planned"), REFUSED, ids=str)
def test_bad_input_to_a_quantizer_is_refused_by_name_and_leaves_nothing(
    bases, tmp_path, base, quantizer, code, place, planned
):
    settings = settings_of(bases / base, quantizer)
    for act in (luthier.train, luthier.plan) if planned else (luthier.train,):
        with pytest.raises(LuthierError) as caught:
            act(**settings, output_dir=tmp_path / "run")
        assert (caught.value.code, caught.value.where) == (code, place.format(base=bases / base)), caught.value
        assert caught.value.remedy
        assert not (tmp_path / "run").exists()


def test_rows_that_give_the_tokens_of_a_measurement_pass(bases, tmp_path):
    settings = settings_of(bases / "dense", {**CALIBRATED, "calibration_samples": 56})
    assert luthier.plan(**settings).schedule["total_steps"] == 2
    assert luthier.train(**settings, output_dir=tmp_path / "run").steps == 2


def test_a_step_after_the_first_that_measures_too_few_tokens_is_found_before_the_run(bases, tmp_path):
    settings = settings_of(bases / "dense", {**CALIBRATED, "calibration_samples": 21, "calibration_frequency": 1})
    with pytest.raises(LuthierError) as caught:  # 8 rows by 3: the third step has two rows of 7 tokens
        luthier.train(**{**settings, "max_steps": 3}, global_batch_size=3, output_dir=tmp_path / "run")
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", "quantizer.calibration_samples")
    assert luthier.train(**settings, global_batch_size=3, output_dir=tmp_path / "run").steps == 2


def test_a_stream_whose_first_step_measures_too_few_tokens_is_found_before_the_run(bases, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = settings_of(bases / "dense", {**CALIBRATED, "calibration_samples": 57})
    settings["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "streaming": True, "max_length": 64}
    settings |= {"output_dir": tmp_path / "run", "max_tokens_per_device": 256, "max_steps": 1}
    with pytest.raises(LuthierError) as caught:
        luthier.train(**settings)
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", "quantizer.calibration_samples")
    assert "has 56" in str(caught.value) and not (tmp_path / "run").exists()
    settings["quantizer"]["calibration_samples"] = 56
    assert luthier.train(**settings).steps == 1


@pytest.mark.parametrize(
    ("base", "chosen", "code", "place"),
    [
        ("gpt2", "gguf", "part-unsupported", "model_type"),
        ("gpt2", "bitnet_packed", "part-unsupported", "GPT2LMHeadModel"),
        ("odd", {"name": "gguf", "type": "q4_0"}, "part-unsupported", "hidden_size"),
        ("dense", {"name": "gguf", "type": "tq2_0"}, "part-unsupported", "hidden_size"),
        ("dense", "bitnet_packed", "part-unsupported", "LlamaForCausalLM"),
        ("ternary", "bitnet_packed", "part-unsupported", "model.layers.0.self_attn.q_proj"),
        *(("nan", chosen, "model-weights", "{base}") for chosen in ("gguf", "onnx", "bitnet_packed")),
    ],
    ids=str,
)
def test_an_export_that_its_target_cannot_hold_is_refused_and_leaves_nothing(
    bases, tmp_path, base, chosen, code, place
):
    with pytest.raises(LuthierError) as caught:
        luthier.export(bases / base, chosen, output_dir=tmp_path / "export")
    assert (caught.value.code, caught.value.where) == (code, place.format(base=bases / base)), caught.value
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.9, 0.3, 0])
@pytest.mark.parametrize("base", ["dense", "bnb", "packed"])
def test_a_base_cut_short_is_refused_before_the_run(bases, tmp_path, base, share):
    path = cut_short(bases / base, tmp_path / "base", share)
    with pytest.raises(LuthierError) as caught:
        luthier.train(**settings_of(tmp_path / "base", "none"), output_dir=tmp_path / "run")
    assert (caught.value.code, caught.value.where) == ("file-damaged", str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.9, 0])
@pytest.mark.parametrize("act", [luthier.load, luthier.merge, lambda run: luthier.export(run, "gguf")])
def test_a_trained_artifact_cut_short_is_refused_by_every_reader(bases, tmp_path, act, share):
    path = cut_short(bases / "ternary", tmp_path / "run", share)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LuthierError) as caught:
        act(tmp_path / "run")
    assert (caught.value.code, caught.value.where) == ("file-damaged", str(path))
    assert sorted(tmp_path.rglob("*")) == before


def cut_short(folder, copied, share):
    """Copy a folder and keep a share of its weights' file; return that file."""
    shutil.copytree(folder, copied)
    (path,) = (
        copied.rglob("model/quantized.safetensors") if (copied / "model").is_dir() else copied.glob("*.safetensors")
    )
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def test_the_command_line_says_where_and_what_to_do(bases, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {bases / 'bnb'}\nquantizer: nf4\nadapter: {{name: lora, r: 4}}\noutput_dir: {tmp_path / 'run'}\n"
        f"data: {tmp_path / 'rows.jsonl'}\nmax_steps: 1\nlearning_rate: 1e-3\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    for verb in ("plan", "train"):
        answer = CliRunner().invoke(app, [verb, str(recipe)])
        assert answer.exit_code == 2, answer.output
        assert all(words in answer.output for words in ("quantizer", "bitsandbytes", "none", "part-unsupported"))
    assert not (tmp_path / "run").exists()
