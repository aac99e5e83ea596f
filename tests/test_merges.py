"""Merges of adapters: onto what the base computes or what the checkpoint holds, and what rounding leaves of them."""

import functools
import json

import luthier
import pytest
import torch
from luthier.artifacts.dense_copy import DenseCopy
from luthier.cli.app import app
from luthier.errors import LuthierError
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

QUERY = "model.layers.0.self_attn.q_proj.weight"
LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, model_folder, rows):
    """A LoRA on four-bit layers, trained a little."""
    return luthier.train(model=str(model_folder), data=rows, adapter=LORA, quantizer="nf4", max_steps=2,
                         output_dir=tmp_path_factory.mktemp("nf4") / "run", learning_rate=1e-2, exact_callbacks=[],
                         precision="float32")  # fmt: skip


@pytest.fixture
def command():
    def run(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        return done.exit_code, json.loads(done.stdout)

    return run


def update_of(run):
    tensors = load_file(run.artifact / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{QUERY.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
    return 16 / 4 * b @ a


def test_an_update_is_put_upon_what_a_quantized_layer_computes_or_upon_the_checkpoint(
    quantized, model_folder, tmp_path, command
):
    found = {}
    for onto in ("dequantized", "original"):
        status, found[onto] = command("merge", quantized.output_path, "--output-dir", tmp_path / onto, "--onto", onto,
                                      "--json")  # fmt: skip
        assert status == 0
    base = load_file(model_folder / "model.safetensors")[QUERY]
    merged = {onto: load_file(tmp_path / onto / "model.safetensors")[QUERY] for onto in found}
    assert torch.allclose(merged["original"], base + update_of(quantized), atol=1e-6)
    assert not torch.allclose(merged["dequantized"], merged["original"], atol=1e-3)
    errors = found["original"]["errors"]
    assert set(errors) == set(found["dequantized"]["errors"]) == {"dequantized", "original"}
    assert errors["dequantized"] < 1e-5 < 1e-3 < errors["original"]  # four bits were lost, and are not any more
    assert json.loads((tmp_path / "original/luthier.json").read_text())["merge"]["onto"] == "original"


def test_of_a_base_that_was_never_quantized_nothing_is_dequantized(narrow, rows, tmp_path):
    run = luthier.train(model=str(narrow), data=rows, adapter=LORA, max_steps=2, learning_rate=1e-2,
                        output_dir=tmp_path / "run", exact_callbacks=[])  # fmt: skip
    note = json.loads((luthier.merge(run.output_path) / "luthier.json").read_text())
    assert note["merge"]["onto"] == "plain" and list(note["merge"]["errors"]) == ["plain"]


def test_a_base_to_merge_onto_that_there_is_not_is_refused_before_a_weight_is_read(tmp_path):
    with expect_error("recipe-out-of-range", "onto") as caught:
        luthier.merge(tmp_path, onto="orignal")
    assert caught.value.code == "recipe-out-of-range" and "original" in caught.value.remedy


@pytest.fixture
def narrow(tmp_path, model_folder):
    """The tiny model in bfloat16 with its tokenizer."""
    import shutil

    folder = tmp_path / "bfloat16"
    shutil.copytree(model_folder, folder)
    tiny_model().bfloat16().save_pretrained(folder)
    return folder


def test_a_merge_that_rounding_would_erase_is_refused_and_kept_in_float32(narrow, rows, tmp_path):
    run = luthier.train(model=str(narrow), data=rows, adapter=LORA, max_steps=1, learning_rate=1e-7,
                        output_dir=tmp_path / "run", exact_callbacks=[])  # fmt: skip
    with pytest.raises(LuthierError) as caught:
        luthier.merge(run.output_path)
    assert caught.value.code == "artifact-unmergeable" and "--save-dtype float32" in caught.value.remedy
    assert not (run.output_path / "merged").exists()
    merged = luthier.merge(run.output_path, save_dtype="float32")
    base, whole = (load_file(folder / "model.safetensors")[QUERY] for folder in (narrow, merged))
    change, update = whole - base.float(), update_of(run)
    assert update.norm() > 0 and (change - update).norm() < 0.2 * update.norm()


def test_a_merge_in_bfloat16_says_how_much_of_the_update_is_left(narrow, rows, tmp_path, command):
    run = luthier.train(model=str(narrow), data=rows, adapter=LORA, max_steps=2, learning_rate=1e-2,
                        output_dir=tmp_path / "run", exact_callbacks=[])  # fmt: skip
    status, found = command("merge", run.output_path, "--json")
    assert status == 0 and 0.9 < found["kept"] < 1.1 and found["dtype"] == "bfloat16"


@pytest.mark.parametrize(("size", "least", "most"), [(1e-1, 0.98, 1.02), (1e-6, 0.0, 0.2)])
def test_the_share_that_is_kept_is_that_of_the_rounded_difference(size, least, most):
    draw = functools.partial(torch.randn, 32, 32, generator=torch.Generator().manual_seed(0))
    base = torch.nn.Linear(32, 32, bias=False)
    base.weight.data = draw().bfloat16().float()
    merged = torch.nn.ModuleDict({"layer": torch.nn.Linear(32, 32, bias=False)})
    merged["layer"].weight.data = base.weight.data + size * draw()
    dense = DenseCopy(model=merged, changed={"layer": base}, narrow={}, weigh=lambda path, layer: layer.weight.data)
    assert least <= dense.measure_kept(torch.bfloat16) <= most
    assert dense.measure_kept(torch.float32) == pytest.approx(1.0, abs=0.05)
    unchanged = DenseCopy(model=merged, changed={}, narrow={}, weigh=dense.weigh)
    assert unchanged.measure_kept(torch.bfloat16) is None
