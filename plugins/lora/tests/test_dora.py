"""DoRA: its norm in closed form, the paper's gradient, its beginning, and quantized layers under it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_lora.layers import Form, Switch
from luthier_lora.product import rescaled_product
from luthier_lora.wrappers import DoraLayer, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

CPU = torch.device("cpu")


class Rounded(nn.Module):
    """A weight in steps of 1/8 with a scale for each row, as a quantizer would keep it."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True))
        self.register_buffer("codes", (weight / self.scale * 8).round().to(torch.int8))
        self.bias = nn.Parameter(bias.clone(), requires_grad=False)

    def dense(self):
        return self.codes.float() / 8 * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


def made(base, rank=3, scale=1.5, dtype=torch.float64, cls=DoraLayer, dropout=0.0):
    layer = cls(
        base,
        Form(rank=rank, scale=scale, dropout=dropout, dtype=dtype, device=CPU),
        Switch(),
        lambda layer: layer.dense(),
    )
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor.weight, std=0.3)
    if cls is DoraLayer:
        layer.begin()
        layer.lora_magnitude_vector.data.mul_(torch.rand(layer.out_features, dtype=dtype) + 0.5)
    return layer


def weight_of(layer):
    base = layer.base_layer
    return base.weight.T if isinstance(base, Conv1D) else base.weight


def by_the_paper(layer, x):
    """Equation 5 with section 4.3's detached norm, in full matrices."""
    directed = weight_of(layer) + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    norm = directed.norm(dim=1, keepdim=True).detach()
    return nn.functional.linear(x, layer.lora_magnitude_vector[:, None] * directed / norm, layer.bias)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.floats(0.01, 10), st.integers(0, 2**16))
def test_norm_in_closed_form_is_that_of_the_whole_matrix(inputs, outputs, rank, scale, seed):
    torch.manual_seed(seed)
    layer = made(nn.Linear(inputs, outputs).double(), rank, scale)
    whole = layer.base_layer.weight + scale * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.norm(), whole.norm(dim=1), rtol=1e-7, atol=1e-9)


def test_norm_in_float32_is_as_good_as_the_matrix_written_out():
    torch.manual_seed(0)
    exact = made(nn.Linear(512, 64).double(), rank=8)
    layer = made(nn.Linear(512, 64), rank=8, dtype=torch.float32)
    layer.load_state_dict({name: t.float() for name, t in exact.state_dict().items()})
    layer.base_square.copy_(exact.base_square)
    torch.testing.assert_close(layer.norm().double(), exact.norm(), rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0.01, 2), st.integers(0, 2**16))
def test_norm_for_bfloat16_outputs_is_off_by_less_than_their_rounding_of_the_update(inputs, outputs, scale, seed):
    torch.manual_seed(seed)
    layer = made(nn.Linear(inputs, outputs).bfloat16(), 3, scale, dtype=torch.float32)
    update = (scale * layer.lora_B.weight.abs() @ layer.lora_A.weight.abs()).norm(dim=1)
    bound = 2**-7 * update * layer.base_weight().norm(dim=1) / layer.norm() + 1e-5 * layer.norm()
    assert ((layer.norm(torch.bfloat16) - layer.norm()).abs() <= bound).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_rescaled_product_has_the_value_and_gradients_of_its_formula(shape, bias):
    torch.manual_seed(0)
    result = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    magnitude = torch.randn(5, dtype=torch.float64, requires_grad=True)
    norm = torch.rand(5, dtype=torch.float64) + 0.5
    offset = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = [result, magnitude] + ([] if offset is None else [offset])
    plain = 0.0 if offset is None else offset
    expected = magnitude / norm * (result - plain) + plain
    rescaled = rescaled_product(result, magnitude, norm, offset)
    torch.testing.assert_close(rescaled, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(rescaled, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_change_too_small_for_a_bfloat16_factor_reaches_the_outputs():
    torch.manual_seed(0)
    result, norm = torch.randn(4000, 8, dtype=torch.bfloat16), torch.ones(8)
    rescaled = rescaled_product(result, norm * 1.003, norm, None)
    assert torch.tensor(1.003).bfloat16() == 1
    rounded_once = (result.double() * 1.003).bfloat16()
    assert (rescaled == rounded_once).float().mean() > 0.98
    assert (rescaled != result).float().mean() > 0.3


def test_magnitude_equal_to_the_norm_leaves_a_product_bit_for_bit():
    torch.manual_seed(0)
    result, norm, bias = torch.randn(16, 8, dtype=torch.bfloat16), torch.rand(8) + 0.1, torch.randn(8)
    assert torch.equal(rescaled_product(result, norm.clone(), norm, bias.bfloat16()), result)


def test_gradient_of_a_magnitude_is_summed_in_float32():
    result = torch.ones(4096, 3, dtype=torch.bfloat16)
    magnitude = torch.ones(3, requires_grad=True)
    rescaled_product(result, magnitude, torch.ones(3), None).sum().backward()
    assert torch.equal(magnitude.grad, torch.full((3,), 4096.0))  # a sum in bfloat16 would end at 256


@pytest.mark.parametrize("base", [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), Conv1D(5, 7), Conv1D(6, 6)])
def test_output_and_gradients_are_the_papers(base):
    torch.manual_seed(0)
    layer = made(base.double().requires_grad_(False))
    x = torch.randn(2, 4, layer.in_features, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 4, layer.out_features, dtype=torch.float64)
    inputs = [x, *layer.own().values()]
    ours, paper = layer(x), by_the_paper(layer, x)
    torch.testing.assert_close(ours, paper, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(paper, inputs, cotangent)
    for mine, theirs in zip(torch.autograd.grad(ours, inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradient_is_not_that_of_a_norm_that_moves():
    torch.manual_seed(0)
    layer = made(nn.Linear(7, 5).double())
    directed = weight_of(layer) + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    moving = layer.lora_magnitude_vector[:, None] * directed / directed.norm(dim=1, keepdim=True)
    x = torch.randn(4, 7, dtype=torch.float64)
    b = layer.lora_B.weight
    (mine,) = torch.autograd.grad(layer(x).square().sum(), b)
    (other,) = torch.autograd.grad(nn.functional.linear(x, moving, layer.bias).square().sum(), b)
    assert not torch.allclose(mine, other, rtol=1e-3)


def test_magnitude_begins_as_the_norm_of_each_output_row():
    base = Conv1D(6, 6)  # square: a transposed norm would have the same shape
    layer = DoraLayer(base, Form(rank=2, scale=1.0, dropout=0.0, dtype=torch.float32, device=CPU), Switch(), None)
    layer.begin()
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), base.weight.norm(dim=0).detach())


def test_row_of_zeros_trains_without_nan():
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[1] = 0
    form = Form(rank=2, scale=1.0, dropout=0.0, dtype=torch.float32, device=CPU)
    layer = DoraLayer(base, form, Switch(), None)
    nn.init.normal_(layer.lora_A.weight)
    layer.begin()
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    optimizer = torch.optim.SGD(layer.own().values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert layer(x).isfinite().all()
    assert layer.folded().isfinite().all()


def test_dropout_reaches_the_update_only():
    torch.manual_seed(0)
    layer = made(nn.Linear(6, 4).double(), dropout=0.9)
    layer.lora_B.weight.data.zero_()
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.eval()(x))


@pytest.mark.parametrize("cls", [LoraLayer, DoraLayer])
def test_quantized_layer_is_adapted_as_its_dequantized_twin(cls):
    torch.manual_seed(0)
    quantized = Rounded(torch.randn(5, 7), torch.randn(5))
    twin = nn.Linear(7, 5)
    twin.load_state_dict({"weight": quantized.dense(), "bias": quantized.bias})
    layer, other = (made(base, dtype=torch.float32, cls=cls) for base in (quantized, twin))
    for name, parameter in other.own().items():
        parameter.data.copy_(layer.own()[name])
    x = torch.randn(2, 7)
    torch.testing.assert_close(layer(x), other(x))
    torch.testing.assert_close(layer.folded(), other.folded())
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.own().values())


@pytest.mark.parametrize("cls", [LoraLayer, DoraLayer])
@pytest.mark.parametrize("base", [nn.Linear(7, 5), Conv1D(5, 7)])
def test_folded_weight_computes_what_the_layer_does(cls, base):
    torch.manual_seed(0)
    layer = made(base.double(), cls=cls).eval()
    x = torch.randn(4, 7, dtype=torch.float64)
    folded = nn.functional.linear(x, layer.folded(), layer.bias)
    torch.testing.assert_close(folded, layer(x), rtol=1e-12, atol=1e-12)
