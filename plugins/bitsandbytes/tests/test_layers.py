"""Layers beside bitsandbytes' own, and what is refused."""

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model
from luthier_bitsandbytes.layer import BnbLinear, Form
from luthier_bitsandbytes.library import bitsandbytes, functional
from torch import nn

FORMS = [Form(kind=k, block_size=32, nested=n) for k in ("nf4", "fp4") for n in (False, True)] + [Form(kind="int8")]
ROWS = [{"prompt": f"{i}?", "completion": "yes"} for i in range(8)]


def made(form, out_features=24, in_features=40, **options):
    dense = nn.Linear(in_features, out_features, **options)
    layer = BnbLinear(dense, form)
    layer.put(dense.weight)
    return dense, layer


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (24, 40), (64, 64)], ids=str)
def test_a_weight_comes_back_within_its_bits(form, shape):
    torch.manual_seed(0)
    dense, layer = made(form, *shape)
    error = (layer.dense() - dense.weight).norm() / dense.weight.norm()
    assert error < {"nf4": 0.15, "fp4": 0.2, "int8": 0.02}[form.kind]
    opened = layer.dense()
    layer.put(opened)
    torch.testing.assert_close(layer.dense(), opened, rtol=1e-2, atol=1e-4)  # quantizing again changes nothing


@pytest.mark.parametrize("nested", [False, True])
def test_the_bytes_are_those_of_bitsandbytes(nested):
    dense, layer = made(Form(kind="nf4", block_size=64, nested=nested), 64, 128)
    packed, state = functional.quantize_4bit(
        dense.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    assert torch.equal(layer.weight, packed) and torch.equal(layer.absmax, state.absmax)
    torch.testing.assert_close(layer.dense(), functional.dequantize_4bit(packed, state), rtol=0, atol=0)


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
    assert layer.absmax.dtype in (torch.float32, torch.uint8)


@pytest.fixture
def train(tmp_path):
    save_tiny_model(tmp_path / "model", "llama")

    def run(**settings):
        given = {"adapter": "lora", "max_steps": 2, "learning_rate": 1e-2, "output_dir": tmp_path / "run", **settings}
        return luthier.train(model=str(tmp_path / "model"), data=ROWS, num_threads=1, **given)

    return run


@pytest.mark.parametrize("name", ["bnb.adamw_8bit", "bnb.lion_8bit"])
def test_its_optimizers_train(train, name):
    run = train(quantizer="bnb.int8", optimizer=name, max_steps=4)
    assert run.loss_history[-1] < run.loss_history[0]


def test_pages_without_a_gpu_are_refused_with_the_name_of_our_part(train):
    with expect_error("part-unsupported", "optimizer") as caught:
        train(optimizer="bnb.paged_adamw_8bit")
    assert caught.value.code == "part-unsupported"


def test_a_weight_that_is_no_number_is_refused():
    from luthier.testing import context
    from luthier.testing.worlds import tiny_model
    from luthier_bitsandbytes import BnbInt8
    from luthier_bitsandbytes.quantizer import BnbQuantizer

    model = tiny_model()
    next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.data[0, 0] = float("nan")
    with pytest.raises(LuthierError) as caught:
        BnbQuantizer(BnbInt8()).apply(model, context(model))
    assert caught.value.code == "bitsandbytes:nonfinite-weight"
    assert bitsandbytes.__version__ >= "0.50"
