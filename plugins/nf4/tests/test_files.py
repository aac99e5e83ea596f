"""A 4-bit model's files: read by transformers with bitsandbytes, with the same logits."""

import bitsandbytes.functional as bnb
import pytest
import torch
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_nf4 import Fp4, Nf4, save_quantized
from luthier_nf4.layer import FourBitLinear
from luthier_nf4.quantizer import FourBitQuantizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

IDS = torch.arange(10, 22)[None]
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # rows of whole blocks, as bitsandbytes needs them


def quantized(options, dtype=torch.float32, **changes):
    model = tiny_model(**WIDE, **changes).eval()
    for parameter in model.parameters():  # as `from_pretrained` does it: rotary tables keep float32
        parameter.data = parameter.data.to(dtype)
    return FourBitQuantizer(options).apply(model, context(model))


@pytest.mark.parametrize(
    "options", [Nf4(), Fp4(), Nf4(use_double_quant=False), Nf4(skip_modules=["down_proj"])], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_it_with_bitsandbytes_and_gives_the_same_logits(tmp_path, options, dtype):
    model = quantized(options, dtype)
    save_quantized(model, tmp_path)
    # in training mode: to infer, bitsandbytes rounds scales and states to bfloat16 on some processors
    read = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).train()
    kinds = {type(m).__name__ for m in read.model.layers.modules()}
    assert "Linear4bit" in kinds and ("Linear" in kinds) == bool(options.skip_modules)
    for path, layer in model.named_modules():
        if isinstance(layer, FourBitLinear):
            weight = read.get_submodule(path).weight
            assert torch.equal(
                bnb.dequantize_4bit(weight.data, weight.quant_state).float(), layer.held().dequantize(dtype).float()
            )
    with torch.no_grad():
        ours, theirs = (m(IDS, use_cache=False).logits for m in (model, read))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_written_once(tmp_path):
    save_quantized(quantized(Nf4(), tie_word_embeddings=True), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4" in names


def test_a_dense_model_and_one_with_an_adapter_are_refused_and_nothing_is_written(tmp_path):
    with expect_error("part-unsupported", "LlamaForCausalLM", "4"):
        save_quantized(tiny_model(), tmp_path / "dense")
    from luthier_lora import Lora
    from luthier_lora.adapter import LoraAdapter

    model = quantized(Nf4())
    part = FourBitQuantizer(Nf4())
    wrapped = LoraAdapter(Lora()).attach(model, context(model, quantizer=part))
    with expect_error("part-unsupported", "model.layers.0.self_attn.q_proj.base_layer"):
        save_quantized(wrapped, tmp_path / "wrapped")
    assert list(tmp_path.iterdir()) == []


def test_what_bitsandbytes_quantizes_is_what_is_held():
    dense = tiny_model(**WIDE)
    model = quantized(Nf4())
    for path, layer in model.named_modules():
        if isinstance(layer, FourBitLinear):
            packed, _ = bnb.quantize_4bit(
                dense.get_submodule(path).weight.data, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(packed, layer.weight)
