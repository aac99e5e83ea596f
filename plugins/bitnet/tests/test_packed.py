"""Packed BitNet checkpoints: transformers reads them, in both conventions, with the logits of the trained model."""

import json

import pytest
import torch
from luthier import LuthierError, Progress
from luthier.demo import MODEL
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Bitnet, Packed, Schedule, Ternary, save_packed
from luthier_bitnet.exporter import PackedExporter
from luthier_bitnet.quantizer import TernaryQuantizer, find_layers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.arange(10, 22)[None]


def quantized(options, architecture="llama", **changes):
    model = tiny_model(architecture, **changes).eval()
    part = TernaryQuantizer(options)
    return part.apply(model, context(model)), part


@pytest.mark.parametrize(("convention", "kind"), [("divide", "BitLinear"), ("multiply", "AutoBitLinear")])
@pytest.mark.parametrize("method", ["absmean", "twn"])
def test_transformers_reads_it_and_gives_the_same_logits(tmp_path, convention, kind, method):
    model, _ = quantized(Bitnet(method=method))
    save_packed(model, tmp_path, convention)
    with torch.compiler.set_stance("force_eager"):  # transformers compiles its unpacking
        read = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
        kinds = [type(m).__name__ for m in read.model.layers.modules()]
        assert kinds.count(kind) == 14 and "Linear" not in kinds
        with torch.no_grad():
            ours, theirs = (m(IDS, use_cache=False).logits for m in (model, read))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model in ternary form, which has layers enough that a code on an edge changes what follows."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()
    TernaryQuantizer(Bitnet()).apply(model, context(model))
    return model, AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.mark.parametrize("weight_scale", ["divide", "multiply"])
def test_codes_that_fall_to_either_side_are_no_mismatch(tmp_path, embedded, weight_scale):
    exporter = PackedExporter(Packed(weight_scale=weight_scale))
    exporter.export(*embedded, tmp_path)
    found = exporter.verify(*embedded, tmp_path)
    assert found["logits, relative"] < 1e-4


def test_a_scale_that_is_a_tenth_off_is_a_mismatch(tmp_path, embedded):
    exporter = PackedExporter(Packed())
    exporter.export(*embedded, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.down_proj.weight_scale"] *= 1.1
    save_file(tensors, file, {"format": "pt"})
    with expect_error("artifact-mismatch", str(tmp_path), "logits"):
        exporter.verify(*embedded, tmp_path)


def test_it_takes_two_bits_a_weight(tmp_path):
    model, _ = quantized(Bitnet())
    save_packed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for path, layer in find_layers(model).items():
        assert tensors[f"{path}.weight"].numel() * 4 == layer.weight.numel()
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (Ternary(), {}, ("model.layers.0.self_attn.q_proj",)),
        (Bitnet(granularity="row"), {}, ("model.layers.0.self_attn.q_proj",)),
        (Bitnet(), {"intermediate_size": 50}, ("model.layers.0.mlp.gate_proj", "50", "4")),
        (Bitnet(schedule=Schedule(end_step=5)), {}, ("model.layers.0.self_attn.q_proj",)),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path, options, changes, message):
    model, part = quantized(options, **changes)
    part.progressed(Progress(step=2, total_steps=10, epoch=0.5))
    with pytest.raises(LuthierError) as caught:
        save_packed(model, tmp_path / "packed")
    assert all(fact in str(caught.value) for fact in message)
    assert caught.value.code == "part-unsupported" and list(tmp_path.iterdir()) == []
