"""What Luthier asks of every quantizer, and the way a merge takes through it."""

import pytest
import torch
from luthier.testing import conformance, context
from luthier.testing.worlds import tiny_model
from luthier_int8 import Int8, luthier_quantizers
from luthier_int8.quantizer import Int8Quantizer


@conformance(luthier_quantizers(), examples=[Int8(group_size=32, skip_modules=["mlp"])])
def test_conforms(check):
    check()


@conformance(luthier_quantizers(), model=lambda: tiny_model("gpt2"), vary=False)
def test_conforms_on_a_model_with_biases_tied_weights_and_transposed_layers(check):
    check()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merge_reads_and_writes_weights_through_the_context(architecture):
    part = Int8Quantizer(Int8())
    model = part.apply(dense := tiny_model(architecture).eval(), context(dense))
    given = context(model, quantizer=part)
    name, layer = next((n, m) for n, m in model.named_modules() if part.dequantize(m) is not None)
    weight = given.dequantize(layer)
    delta = torch.randn_like(weight) * 0.1
    states = torch.randn(4, layer.in_features)
    expected = torch.nn.functional.linear(states, weight + delta, layer.bias)
    given.requantize(layer, weight + delta)
    assert model.get_submodule(name) is layer and layer.weight.dtype == torch.int8
    assert (layer(states) - expected).norm() / expected.norm() < 0.02
