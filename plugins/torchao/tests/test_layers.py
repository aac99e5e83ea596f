"""Layers besides torchao's own tensors, what is refused, and a run from start to reload."""

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.step.opened import open_artifact
from luthier.testing import context
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_torchao import TorchaoInt8
from luthier_torchao.layer import Form, TorchaoLinear, open_codes, pack_codes
from luthier_torchao.library import EVEN, MAPPINGS, ROWS, Int8, IntX
from luthier_torchao.quantizer import TorchaoQuantizer
from torch import nn

FORMS = [Form(bits=8), *(Form(bits=4, group_size=32, mapping=mapping) for mapping in MAPPINGS)]
ROWS_OF_DATA = [{"prompt": f"{i}?", "completion": "yes"} for i in range(8)]


def made(form, out_features=24, in_features=40, **options):
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features, **options)
    layer = TorchaoLinear(dense, form)
    layer.put(dense.weight)
    return dense, layer


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (24, 40), (8, 64), (5, 0)], ids=str)
def test_a_weight_comes_back_within_its_bits_and_once_more_unchanged(form, shape):
    dense, layer = made(form, *shape)
    step = layer.scale.repeat_interleave(form.group_size if form.bits == 4 else shape[1], -1)[:, : shape[1]]
    assert ((layer.dense() - dense.weight).abs() <= 0.51 * step).all()
    opened = layer.dense()
    layer.put(opened)
    torch.testing.assert_close(layer.dense(), opened, rtol=1e-5, atol=1e-7)


def test_int8_values_are_those_of_torchaos_tensor():
    dense, layer = made(FORMS[0])
    theirs = Int8.from_hp(dense.weight.detach(), granularity=ROWS, mapping_type=EVEN)
    assert torch.equal(layer.weight, theirs.qdata) and torch.equal(layer.dense(), theirs.dequantize())


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_int4_values_are_those_of_torchaos_tensor_in_half_the_bytes(mapping):
    dense, layer = made(Form(bits=4, group_size=32, mapping=mapping), 24, 64)
    theirs = IntX.from_hp(dense.weight.detach(), (1, 32), torch.int4, mapping_type=MAPPINGS[mapping])
    assert torch.equal(open_codes(layer.weight), theirs.qdata) and torch.equal(layer.dense(), theirs.dequantize())
    assert layer.weight.numel() * 2 == theirs.qdata.numel()


def test_codes_are_packed_with_the_even_one_in_the_low_bits():
    codes = torch.arange(-8, 8, dtype=torch.int8).view(2, 8)
    packed = pack_codes(codes)
    assert packed[0, 0] == 0 | 1 << 4 and torch.equal(open_codes(packed), codes)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_gradients_are_those_of_the_opened_weight(form):
    dense, layer = made(form)
    states = torch.randn(5, 40, requires_grad=True)
    expected = nn.functional.linear(states, layer.dense(), dense.bias)
    upstream = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, states, upstream)
    found = layer(states)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, states, upstream)[0], wanted)
    layer.bfloat16()
    assert layer.scale.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"quantizer": "torchao.int4"}, {"quantizer": "torchao.int8"}])
def test_a_run_on_such_a_base_is_saved_and_opened_again(tmp_path, settings):
    folder = str(save_tiny_model(tmp_path / "model", "llama"))
    run = luthier.train(
        model=folder, data=ROWS_OF_DATA, adapter="lora", optimizer="torchao.adamw_8bit", max_steps=4, learning_rate=1e-2,
        num_threads=1, output_dir=tmp_path / "run", exact_callbacks=[], **settings,
    )  # fmt: skip
    assert run.loss_history[-1] < run.loss_history[0]
    opened = open_artifact(tmp_path / "run").model.state_dict()
    expected = run.model.state_dict()
    assert opened.keys() == expected.keys() and all(torch.equal(opened[name], expected[name]) for name in expected)


def test_a_weight_that_is_no_number_is_refused():
    model = tiny_model()
    next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.data[0, 0] = float("nan")
    with pytest.raises(LuthierError) as caught:
        TorchaoQuantizer(TorchaoInt8()).apply(model, context(model))
    assert caught.value.code == "torchao:nonfinite-weight"
