"""Ternary training end to end: full and LoRA, by a schedule; resumed bit for bit in each phase, reopened, merged, packed."""

import json

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.artifacts.serving import find_serving
from luthier.cli.app import app
from luthier.model.attention import generating_attention
from luthier.step.opened import open_artifact
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model
from luthier_bitnet import Bitnet, Schedule, Ternary, save_packed
from luthier_bitnet.choices import Choice
from luthier_bitnet.quantizer import find_layers
from luthier_bitnet.uniform.quantizer import find_uniform
from transformers import AutoModelForCausalLM

STEPS = 8
IDS = torch.arange(10, 30)[None]
SLOWLY = {"start_step": 2, "end_step": 6, "schedule_type": "cosine"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny Llama, and rows to train on."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "llama")
    rows = [{"prompt": f"{i} plus {j} is ", "completion": str(i + j)} for i in range(6) for j in range(6)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(world, output, *, adapter="full", quantizer="ternary", exact_callbacks=("jsonl",), **settings):
    if adapter != "full":
        adapter = {"name": adapter, "target_modules": "all-linear", "lora_dropout": 0.1}
    given = {"data": str(world / "train.jsonl"), "max_steps": STEPS, "learning_rate": 1e-2, "save_steps": 1, **settings}
    return luthier.train(
        model=str(world / "llama"),
        adapter=adapter,
        quantizer=quantizer,
        exact_callbacks=list(exact_callbacks),
        output_dir=output,
        **given,
    )


def logits(model):
    with generating_attention(model):
        return model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits.detach()


@pytest.mark.parametrize("quantizer", ["ternary", "bitnet"])
def test_full_training_changes_latent_weights_and_the_loss_falls(world, tmp_path, quantizer):
    run = train(world, tmp_path / "run", quantizer=quantizer, max_steps=16)
    assert run.loss_history[-1] < 0.8 * run.loss_history[0]
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    for path, layer in find_layers(run.model).items():
        assert not torch.equal(layer.weight, base.get_submodule(path).weight)
        assert set(layer.rounded()[0].unique().tolist()) <= {-1, 0, 1}


BREAKS = [
    ("full", "ternary", 4),
    *(("full", "bitnet", n) for n in (1, 4, 7)),
    ("lora", "bitnet", 4),
    ("dora", "ternary", 4),
]


LEARNED = {"name": "qat", "bits": 2, "learn_scale": True, "noise_factor": 0.1, "schedule": SLOWLY}
STAGED = {"name": "qat", "bits": 4, "bits_stages": [8, 4], "schedule": SLOWLY, "estimator": "soft"}
CALIBRATED = {
    "name": "qat_activations", "activation_granularity": "tensor", "online_calibration": True, "schedule": SLOWLY,
    "calibration_frequency": 2, "calibration_samples": 8,
}  # fmt: skip
TUNED = {"name": "qat", "bits": 4, "tuning": {"factors": [0.8, 1.25], "bits": [2], "layers": 3, "max_rise": 0.05}}
TUNED_TERNARY = {"name": "bitnet", "tuning": {"factors": [0.7, 1.4], "layers": 3}}
NORMED = {"name": "bitnet", "sub_norms": ["o_proj", "down_proj"], "schedule": SLOWLY}
BREAKS += [
    ("full", CALIBRATED, 4),
    *(pytest.param("full", q, n, marks=pytest.mark.slow) for q in (LEARNED, STAGED, CALIBRATED) for n in (1, 5, 7)),
    ("full", NORMED, 4),
    *(pytest.param(a, LEARNED, 4, marks=pytest.mark.slow) for a in ("lora", "dora")),
]


@pytest.mark.parametrize(("adapter", "quantizer", "broken"), BREAKS)  # before the schedule, on its way, after it
def test_a_run_that_broke_off_in_any_phase_resumes_bit_for_bit(world, tmp_path, adapter, quantizer, broken):
    slowly = quantizer
    if isinstance(quantizer, str):
        slowly = {"name": quantizer, "schedule": SLOWLY, "second_stage_start": 0.7}

    def break_off(step):
        if step == broken + 1:
            raise RuntimeError("power cut")

    straight = train(world, tmp_path / "straight", adapter=adapter, quantizer=slowly)
    with pytest.raises(RuntimeError, match="power cut"):
        cut = ["jsonl", luthier.on(step_ended=break_off)]
        train(world, tmp_path / "broken", adapter=adapter, quantizer=slowly, exact_callbacks=cut)
    began = []

    def note(step):
        began.append(step)

    noted = ["jsonl", luthier.on(resumed=note)]
    resumed = train(world, tmp_path / "broken", adapter=adapter, quantizer=slowly, exact_callbacks=noted)
    assert began == [broken] or began == [broken + 1]
    assert resumed.loss_history == straight.loss_history and resumed.steps == STEPS
    ours, theirs = (dict(run.model.named_parameters()) for run in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("full", Bitnet(method="twn")),
        ("lora", Ternary(granularity="row")),
        ("dora", Bitnet()),
        ("full", Bitnet(sub_norms=["o_proj"])),
        ("lora", Ternary(sub_norms=["o_proj", "down_proj"])),
    ],
    ids=["full", "lora", "dora", "normed", "lora on normed"],
)
def test_what_was_saved_reopens_with_the_same_logits(world, tmp_path, adapter, options):
    run = train(world, tmp_path / "run", adapter=adapter, quantizer=options)
    opened = open_artifact(tmp_path / "run")
    assert len(find_layers(opened.model)) == 14
    assert torch.equal(logits(opened.model), logits(run.model))


def test_what_was_trained_to_few_bits_reopens_and_merges_with_the_same_logits(world, tmp_path):
    options = {"name": "qat", "bits": 2, "learn_scale": True}
    run = train(world, tmp_path / "run", quantizer=options, merge=True, max_steps=4)
    assert torch.equal(logits(open_artifact(tmp_path / "run").model), logits(run.model))
    plain = AutoModelForCausalLM.from_pretrained(run.merged)
    torch.testing.assert_close(logits(plain), logits(run.model), rtol=1e-4, atol=1e-4)
    assert len(plain.model.layers[0].mlp.up_proj.weight[0].unique()) <= 4
    scales = [p for name, p in run.model.named_parameters() if name.endswith("scale")]
    assert len(scales) == 14 and all(p.requires_grad for p in scales)


@pytest.mark.parametrize("adapter", ["full", "lora", "dora"])
def test_a_merged_ternary_model_is_plain_and_gives_the_same_logits(world, tmp_path, adapter):
    run = train(world, tmp_path / "run", adapter=adapter, merge=True)
    plain = AutoModelForCausalLM.from_pretrained(run.merged)
    assert {type(m).__name__ for m in plain.model.layers[0].mlp.children()} == {"Linear", "SiLUActivation"}
    torch.testing.assert_close(logits(plain), logits(run.model), rtol=1e-4, atol=1e-4)
    if adapter == "full":
        weight = plain.model.layers[0].mlp.up_proj.weight
        assert len(weight.unique()) == 3


def test_a_merge_of_what_has_int8_activations_is_refused_before_training(world, tmp_path):
    with expect_error("artifact-unmergeable", "merge", "'bitnet'") as caught:
        train(world, tmp_path / "run", quantizer="bitnet", merge=True)
    assert caught.value.code == "artifact-unmergeable" and not (tmp_path / "run").exists()


def test_what_has_norms_of_its_own_is_neither_merged_nor_exported_as_plain_layers(world, tmp_path):
    run = train(world, tmp_path / "run", quantizer=Ternary(sub_norms=["down_proj"]), max_steps=1)
    with expect_error("artifact-unmergeable"):
        luthier.merge(run.output_path)
    with expect_error("artifact-unmergeable", "format"):
        luthier.export(run.output_path, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_trained_bitnet_is_packed_and_transformers_gives_its_logits(world, tmp_path):
    run = train(world, tmp_path / "run", quantizer="bitnet")
    save_packed(run.model, tmp_path / "packed")
    with torch.compiler.set_stance("force_eager"):
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", local_files_only=True).eval()
        with torch.no_grad():
            theirs = read(IDS, use_cache=False).logits
    torch.testing.assert_close(logits(run.model), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weight_scale", ["divide", "multiply"])
def test_an_export_of_a_run_is_packed_in_either_convention_and_compared(world, tmp_path, weight_scale):
    train(world, tmp_path / "run", quantizer="bitnet", max_steps=2)
    found = luthier.export(tmp_path / "run", {"name": "bitnet_packed", "weight_scale": weight_scale})
    assert found.differences["logits, relative"] < 5e-3
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found.files.keys()
    kept = json.loads((found.folder / "config.json").read_text())["quantization_config"]["linear_class"]
    assert kept == {"divide": "bitlinear", "multiply": "autobitlinear"}[weight_scale]


def test_what_is_not_packed_bitnet_is_refused_and_leaves_nothing(world, tmp_path):
    train(world, tmp_path / "lora", adapter="lora", quantizer="bitnet", max_steps=1)
    for path, place in ((tmp_path / "lora", "base_layer"), (world / "llama", "LlamaForCausalLM")):
        with pytest.raises(LuthierError) as caught:
            luthier.export(path, "bitnet_packed", tmp_path / "out")
        assert caught.value.code == "part-unsupported" and caught.value.where.endswith(place)
        assert not (tmp_path / "out").exists()


def test_a_ternary_model_becomes_a_gguf_file_of_the_same_weights(world, tmp_path):
    wide = save_tiny_model(tmp_path / "wide", hidden_size=256, intermediate_size=256)
    luthier.train(
        model=str(wide), data=str(world / "train.jsonl"), adapter="full", quantizer="ternary", max_steps=2,
        exact_callbacks=["jsonl"], output_dir=tmp_path / "run",
    )  # fmt: skip
    found = luthier.export(tmp_path / "run", {"name": "gguf", "type": "tq2_0"})
    assert found.differences["logits, relative"] < 5e-3
    assert (
        found.files["model.gguf"] < 0.5 * luthier.export(tmp_path / "run", "gguf", tmp_path / "f16").files["model.gguf"]
    )


def test_weights_are_those_of_the_schedules_end_even_where_training_stops_before_it(world, tmp_path):
    options = Ternary(schedule=Schedule(end_step=100))
    run = train(world, tmp_path / "run", quantizer=options)
    layer = next(iter(find_layers(run.model).values()))
    assert 0 < layer.stage.share < 0.1
    assert torch.equal(logits(open_artifact(tmp_path / "run").model), logits(run.model))


def test_a_trained_ternary_model_is_a_base_for_lora_with_the_same_quantizer_only(world, tmp_path):
    first = train(world, tmp_path / "first", quantizer="bitnet")
    shared = {
        "data": str(world / "train.jsonl"), "adapter": "lora", "max_steps": 2, "learning_rate": 1e-3, "exact_callbacks": ["jsonl"],
    }  # fmt: skip
    run = luthier.train(model=str(first.artifact), quantizer="bitnet", output_dir=tmp_path / "second", **shared)
    assert len(find_layers(run.model)) == 14 and run.steps == 2
    with expect_error("recipe-conflict", "quantizer") as caught:
        luthier.train(model=str(first.artifact), quantizer="nf4", output_dir=tmp_path / "third", **shared)
    assert caught.value.code == "recipe-conflict"


def test_the_command_line_trains_and_generates(world, tmp_path, capsys):
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*map(str, words)])
        document = json.loads(capsys.readouterr().out)
        assert caught.value.code in (0, None), document
        return document

    model = ("--model", world / "llama", "--data", world / "train.jsonl")
    schedule = ("--quantizer.schedule", '{"end_step": 2}', "--learning-rate", "1e-2")
    run = call(
        "train",
        *model,
        "--quantizer",
        "bitnet",
        *schedule,
        "--max-steps",
        3,
        "--output-dir",
        tmp_path / "run",
        "--json",
    )
    assert run["steps"] == 3
    generated = call("generate", tmp_path / "run", "1 plus 2 is ", "--max-new-tokens", 3, "--json")
    assert isinstance(generated["text"], str)


def test_a_merge_that_attached_layers_rule_out_is_refused_before_the_run(world, tmp_path):
    with expect_error("artifact-unmergeable", "merge", "ternary"):
        train(world, tmp_path / "run", quantizer=Ternary(sub_norms=["down_proj"]), merge=True)
    assert not (tmp_path / "run").exists()
    run = train(world, tmp_path / "run", quantizer=Ternary(sub_norms=["down_proj"]), max_steps=1)
    assert "luthier merge" not in str(find_serving(run.artifact))


@pytest.mark.parametrize("tuned", [TUNED, pytest.param(TUNED_TERNARY, marks=pytest.mark.slow)])
def test_a_run_that_tunes_on_validation_rows_keeps_what_helps_and_resumes_bit_for_bit(world, tmp_path, tuned):
    shared = {"quantizer": tuned, "eval_steps": 2, "max_steps": 6}
    shared["data"] = {"train": [{"path": str(world / "train.jsonl")}], "validation": 0.2}

    def break_off(step):
        if step == 5:
            raise RuntimeError("power cut")

    run = train(world, tmp_path / "straight", **shared)
    with pytest.raises(RuntimeError, match="power cut"):
        cut = ["jsonl", luthier.on(step_ended=break_off)]
        train(world, tmp_path / "run", exact_callbacks=cut, **shared)
    resumed = train(world, tmp_path / "run", **shared)
    assert resumed.loss_history == run.loss_history and torch.equal(logits(resumed.model), logits(run.model))
    ours, theirs = ({**find_uniform(one.model), **find_layers(one.model)} for one in (run, resumed))
    kept = {path: layer.choice for path, layer in ours.items() if layer.choice != Choice()}
    assert kept and kept == {path: layer.choice for path, layer in theirs.items() if layer.choice != Choice()}
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    assert run.evaluate()["eval_loss"] == [line for line in lines if "eval_loss" in line][-1]["eval_loss"]
    assert torch.equal(logits(open_artifact(tmp_path / "run").model), logits(run.model))


def test_tuning_is_refused_without_validation_rows_and_where_the_layers_are_not_written(world, tmp_path):
    with expect_error("recipe-conflict", "quantizer.tuning"):
        train(world, tmp_path / "run", quantizer=TUNED)
    rows = {"train": [{"path": str(world / "train.jsonl")}], "validation": 0.2}
    with expect_error("recipe-conflict", "quantizer.tuning"):
        train(world, tmp_path / "run", quantizer=TUNED, adapter="lora", data=rows)
    assert not (tmp_path / "run").exists()
