"""The fused product of the form `core`: the values and gradients of its parts, what it keeps, when it steps aside."""

import pytest
import torch
from luthier_osft.decompose import decompose
from luthier_osft.layers import OsftLayer, Switch
from torch import nn
from transformers.pytorch_utils import Conv1D

SHAPES = [(12, 12), (18, 8), (8, 18)]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wrapped(shape, dtype=torch.float64, *, bias=True, rank=6):
    base = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype).requires_grad_(False)
    base.weight.data.copy_(drawn(*shape))
    layer = OsftLayer(base, rank, Switch(), torch.device("cpu"))
    layer.begin(decompose(base.weight.to(layer.dtype), rank), rank)
    layer.core.data.copy_(drawn(*layer.core.shape, seed=1) / 10)
    return layer


def by_parts(layer, x):
    weight = layer.base_layer.weight if layer.before is None else layer.before
    return nn.functional.linear(x, weight.to(x.dtype), layer.bias) + layer.change(x)


def fuses(layer, x):
    """Return True if the output comes from one operation."""
    return "_Changed" in type(layer(x).grad_fn).__name__


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_parts(shape, bias, later):
    layer = wrapped(shape, bias=bias)
    layer.before = nn.Parameter(drawn(*shape, seed=3), requires_grad=False) if later else None
    x = drawn(2, 5, shape[1], seed=2).requires_grad_()
    assert fuses(layer, x)
    fused, expected = layer(x), by_parts(layer, x)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    cotangent = drawn(2, 5, shape[0], seed=4)
    inputs = (x, layer.core)
    for ours, theirs in zip(
        torch.autograd.grad(fused, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_core_of_more_rows_than_a_later_task_trains_gets_no_gradient_beyond_them(shape):
    layer = wrapped(shape, rank=5)
    layer.begin(decompose(layer.base_layer.weight, 6), 6)
    layer.core.data.copy_(drawn(*layer.core.shape, seed=1))
    x = drawn(3, shape[1], seed=2)
    torch.testing.assert_close(layer(x), by_parts(layer, x), rtol=1e-12, atol=1e-12)
    layer(x).square().sum().backward()
    assert layer.core.grad[:-1, :-1].abs().min() > 0 and not layer.core.grad[-1].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_under_autocast_products_are_in_its_dtype_and_gradients_in_that_of_the_core(shape):
    layer = wrapped(shape, torch.float32)
    x = drawn(4, shape[1], dtype=torch.float32, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.float(), by_parts(layer, x), rtol=0.05, atol=0.1)
    result.float().square().sum().backward()
    fused, layer.core.grad = layer.core.grad, None
    by_parts(layer, x).square().sum().backward()
    assert fused.dtype is torch.float32
    torch.testing.assert_close(fused, layer.core.grad, rtol=0.1, atol=0.05 * layer.core.grad.abs().max().item())


def test_square_layer_keeps_neither_its_input_nor_its_output():
    layer, kept = wrapped((12, 12), torch.float32), []
    x = drawn(50, 12, dtype=torch.float32).requires_grad_()

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in parameters] == [(50, 6)]


def test_without_a_change_the_output_is_the_bases_bit_for_bit():
    for shape in SHAPES:
        layer = wrapped(shape, torch.bfloat16)
        layer.core.data.zero_()
        x = drawn(4, shape[1], dtype=torch.bfloat16)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_hook_on_the_base_layer_is_called():
    layer, calls = wrapped((12, 12)), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(drawn(2, 12))
    assert calls == [1]


def test_layers_of_another_kind_and_bases_stored_as_reflectors_are_computed_by_parts():
    conv = Conv1D(12, 12).requires_grad_(False)
    layer = OsftLayer(conv, 6, Switch(), torch.device("cpu"))
    assert not fuses(layer, drawn(2, 12, dtype=torch.float32))
    assert not fuses(wrapped((12, 12), rank=3), drawn(2, 12))
