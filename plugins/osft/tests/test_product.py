"""The fused products: the values and gradients of their parts, what they keep, and when they step aside."""

import pytest
import torch
from luthier.precision.weight_dtypes import hold_weight
from luthier_osft.decompose import decompose
from luthier_osft.factored import FactoredLayer
from luthier_osft.layers import OsftLayer, Switch
from luthier_osft.product import changed_product, composed_product
from torch import nn
from transformers.pytorch_utils import Conv1D

SHAPES = [(12, 12), (18, 8), (8, 18)]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wrapped(shape, dtype=torch.float64, *, bias=True, rank=6, kind=OsftLayer):
    base = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype).requires_grad_(False)
    base.weight.data.copy_(drawn(*shape))
    layer = kind(base, rank, Switch(), torch.device("cpu"))
    layer.begin(decompose(base.weight.to(layer.dtype), rank, tails=kind is FactoredLayer), rank)
    for parameter in layer.trained().values():
        parameter.data.add_(drawn(*parameter.shape, seed=1) / 10)
    if kind is FactoredLayer:
        layer.project(layer.left.data, layer.right.data)
    return layer


def by_parts(layer, x):
    weight = layer.base_layer.weight if layer.before is None else layer.before
    return nn.functional.linear(x, weight.to(x.dtype), layer.bias) + layer.change(x)


def weight_by_triplets(layer):
    """[out, in]: the weight of the form `factored`, formed as its formula says."""
    first = (layer.first_left * layer.first_values) @ layer.first_right
    return layer.base_layer.weight + (layer.left * layer.values) @ layer.right - first


def gradients(layer, output, cotangent, *inputs):
    """Return those of the inputs, and of what trains after their projection."""
    found = torch.autograd.grad(output, [*inputs, *layer.trained().values()], cotangent.to(output.dtype))
    if isinstance(layer, FactoredLayer):
        layer.project(found[-3], found[-1])
    return found


def fuses(layer, x):
    """Return True if the output comes from one operation."""
    return "_Changed" in type(layer(x).grad_fn).__name__


def composes(layer, x):
    """Return True if the output comes from one matrix."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return "_Composed" in type(layer(x).grad_fn).__name__


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


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_have_the_values_and_gradients_of_the_weight_that_they_describe(shape, tokens):
    layer = wrapped(shape, kind=FactoredLayer)
    x, cotangent = drawn(tokens, shape[1], seed=2).requires_grad_(), drawn(tokens, shape[0], seed=4)
    assert fuses(layer, x) is (tokens == 40)
    expected = nn.functional.linear(x, weight_by_triplets(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(
        gradients(layer, layer(x), cotangent, x), gradients(layer, expected, cotangent, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_of_both_matrices_gives_what_their_products_give(shape, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = drawn(*shape, dtype=wide), drawn(shape[0], seed=1, dtype=wide)
    factors = [drawn(size, 3, seed=seed, dtype=wide).div_(30) for size, seed in ((shape[1], 2), (shape[0], 3))]
    x, cotangent = drawn(2, 30, shape[1], seed=4, dtype=dtype), drawn(2, 30, shape[0], seed=5, dtype=dtype)
    found = []
    for exact, product in ((False, composed_product), (False, _by_products), (True, _by_products)):
        given = [t.double() if exact else t for t in (weight, bias, x, *factors, cotangent)]
        trained = [tensor.requires_grad_() for tensor in given[2:5]]
        output = product(trained[0], given[0], given[1], *trained[1:])
        found.append([output, *torch.autograd.grad(output, trained, given[5])])
    for ours, theirs, exact in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype
        bound = 4 * torch.finfo(dtype).eps
        for other in (theirs.double(), exact):
            assert (ours.double() - other).norm() <= bound * exact.norm()


def _by_products(x, weight, bias, inner, outer):
    return changed_product(x, weight, bias, inner, None, outer)


@pytest.mark.parametrize("kind", [OsftLayer, FactoredLayer])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_tokens_in_bfloat16_are_multiplied_by_the_rounded_sum(shape, kind):
    layer = wrapped(shape, torch.float32, kind=kind)
    x, cotangent = drawn(60, shape[1], dtype=torch.float32, seed=2).requires_grad_(), drawn(60, shape[0], seed=4)
    exact = [layer(x), *gradients(layer, layer(x), cotangent, x)]
    assert composes(layer, x) and not composes(layer, x[:2])
    outputs = []
    for held in (False, True):
        if held:  # as a run keeps a frozen weight: its upper half, and what that cuts off
            hold_weight(layer.base_layer.weight, torch.bfloat16)
            assert layer.base_layer.weight.dtype is torch.bfloat16 and composes(layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(layer(x))
        assert outputs[-1].dtype is torch.bfloat16
        for ours, expected in zip(
            [outputs[-1], *gradients(layer, outputs[-1], cotangent, x)], exact, strict=True
        ):  # fmt: skip
            assert (ours.float() - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(*outputs)


def test_a_weight_of_16_bits_is_not_added_to():
    assert not composes(wrapped((12, 12), torch.bfloat16), drawn(60, 12, dtype=torch.bfloat16, seed=2))


@pytest.mark.parametrize("kind", [OsftLayer, FactoredLayer])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_with_no_change_gives_the_output_of_the_base_bit_for_bit(shape, kind):
    layer = wrapped(shape, torch.float32, kind=kind)
    layer.begin(decompose(layer.base_layer.weight, 6, tails=True), 6)
    x = drawn(60, shape[1], dtype=torch.float32, seed=2)
    assert composes(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


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
