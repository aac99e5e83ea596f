"""Packed BitNet checkpoints: transformers reads them, in both conventions, with the logits of the trained model."""

import json

import pytest
import torch
from luthier import LuthierError, Progress
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Bitnet, Schedule, Ternary, save_packed
from luthier_bitnet.quantizer import TernaryQuantizer, find_layers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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
