"""The fused product: its values and gradients against autograd's, what it keeps, and when it steps aside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.model.operations import reference
from luthier.model.operations.install_operations import ordinary_operations
from luthier_lora.layers import Form, Switch
from luthier_lora.product import adapted_product, kept_elements
from luthier_lora.wrappers import DoraLayer, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


def written_out(x, weight, bias, a, b, scale):
    return nn.functional.linear(x, weight, bias) + (x @ a.T @ b.T) * scale


def drawn(inputs, outputs, rank, dtype=torch.float64, bias=True, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    weight, a, b = draw(outputs, inputs), draw(rank, inputs).requires_grad_(), draw(outputs, rank).requires_grad_()
    return weight, draw(outputs) if bias else None, a, b


def layer(base, dropout=0.0, made=LoraLayer):
    form = Form(rank=4, scale=2.0, dropout=dropout, dtype=torch.float32, device=torch.device("cpu"))
    wrapper = made(base.requires_grad_(False), form, Switch(), lambda inner: inner.weight)
    with torch.no_grad():
        for factor in (wrapper.lora_A, wrapper.lora_B):
            factor.weight.copy_(torch.randn(factor.weight.shape) * 0.1)
    return wrapper


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    scale=st.sampled_from([0.5, 2.0, 32 / 3**0.5]),
    bias=st.booleans(),
)
def test_value_and_gradients_are_those_of_the_formula(shape, sizes, scale, bias):
    inputs, outputs, rank = sizes
    weight, offset, a, b = drawn(inputs, outputs, rank, bias=bias)
    x = torch.randn(*shape, inputs, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape, outputs, dtype=torch.float64)
    found = adapted_product(x, weight, offset, a, b, scale)
    expected = written_out(x, weight, offset, a, b, scale)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, a, b), upstream), torch.autograd.grad(expected, (x, a, b), upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bias_that_trains_gets_its_gradient():
    weight, _, a, b = drawn(5, 3, 2)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adapted_product(torch.randn(7, 5, dtype=torch.float64), weight, bias, a, b, 1.0).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_under_autocast_products_are_in_its_dtype_and_gradients_in_the_masters():
    weight, bias, a, b = drawn(64, 48, 4, torch.float32)
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapted_product(x, weight, bias, a, b, 2.0)
    assert found.dtype is torch.bfloat16
    found.float().sum().backward()
    assert (a.grad.dtype, b.grad.dtype, x.grad.dtype) == (torch.float32,) * 3
    expected = written_out(x, weight, bias, a, b, 2.0)
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03 * expected.detach().abs().max().item())


def test_layers_that_share_an_input_keep_it_once():
    x = torch.randn(32, 16, requires_grad=True)
    kept: dict[int, int] = {}
    layers = [layer(nn.Linear(16, 8)) for _ in range(3)]

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [one(x) for one in layers]
    parameters = sum(p.numel() * 4 for one in layers for p in (*one.own().values(), one.base_layer.weight))
    assert sum(kept.values()) == x.numel() * 4 + parameters + 3 * 32 * 4 * 4  # x, the matrices, and x A^T of each
    assert len(outputs) == 3


@pytest.mark.parametrize("made", [LoraLayer, DoraLayer])
@pytest.mark.parametrize("base", [lambda: nn.Linear(6, 5), lambda: nn.Linear(6, 5, bias=False), lambda: Conv1D(5, 6)])
def test_fused_layer_computes_what_its_folded_weight_does(base, made):
    wrapper = layer(base(), made=made)
    x = torch.randn(3, 6)
    expected = nn.functional.linear(x, wrapper.folded(), wrapper.bias)
    torch.testing.assert_close(wrapper(x), expected, rtol=1e-5, atol=1e-5)


def test_hook_on_the_base_layer_is_called():
    wrapper, seen = layer(nn.Linear(6, 5)), []
    wrapper.base_layer.register_forward_hook(lambda *_: seen.append(1))
    wrapper(torch.randn(2, 6))
    assert seen == [1]


def test_dropout_in_training_leaves_the_base_product_whole():
    wrapper = layer(nn.Linear(6, 5), dropout=0.999).train()
    x = torch.randn(4, 6)
    torch.manual_seed(1)  # with which all but nothing is kept
    torch.testing.assert_close(wrapper(x), wrapper.base_layer(x), rtol=0, atol=1e-6)
    assert not torch.equal(wrapper.eval()(x), wrapper.base_layer(x))


@settings(max_examples=15, deadline=None)
@given(dropout=st.sampled_from([0.05, 0.3, 0.9]), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_gradients_with_dropout_are_those_of_the_mask_that_was_drawn(dropout, count, seed):
    weight, bias, a, b = drawn(7, 5, 3, seed=seed)
    x = torch.randn(count, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(seed)
    found = adapted_product(x, weight, bias, a, b, 2.0, dropout)
    torch.manual_seed(seed)
    kept, more = kept_elements(x, dropout)
    expected = nn.functional.linear(x, weight, bias) + (x * kept * more) @ a.T @ b.T * 2.0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, a, b), upstream), torch.autograd.grad(expected, (x, a, b), upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_dropped_and_mean_are_as_asked(dropout, dtype):
    torch.manual_seed(0)
    kept, more = kept_elements(torch.empty(1000, 999, dtype=dtype), dropout)
    rows = (~kept).double()
    assert abs(rows.mean() - dropout) < 0.002
    assert abs(kept.double().mean() * more - 1.0) < 0.005
    for apart in (1, 2, 3, 4, 5):  # neighbours come from one draw, and are independent all the same
        joint = (rows[:, apart:] * rows[:, :-apart]).mean()
        assert abs(joint - dropout**2) < 0.003


def test_everything_can_be_dropped():
    kept, more = kept_elements(torch.ones(3, 5), 1.0)
    assert not kept.any() and more == 0.0


def test_base_weight_that_trains_gets_a_gradient():
    wrapper = layer(nn.Linear(6, 5))
    wrapper.base_layer.weight.requires_grad_(True)
    wrapper(torch.randn(2, 6)).sum().backward()
    assert wrapper.base_layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_input_with_a_source_is_not_kept_and_gives_the_same_gradients(dropout):
    """`down` of an MLP gets a product that gate and up give again."""
    weight, bias, a, b = drawn(7, 5, 3)
    gate, up = (torch.randn(4, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    operations = ordinary_operations()

    def gradients(x):
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            found = adapted_product(x, weight, bias, a, b, 2.0, dropout)
        return x.data_ptr() in kept, torch.autograd.grad(found.square().sum(), (gate, up, a, b))

    (remade, ours), (kept, theirs) = (gradients(x) for x in (operations.swiglu(gate, up), reference.swiglu(gate, up)))
    assert kept and not remade
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
