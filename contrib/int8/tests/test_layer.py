"""The int8 layer against a dense layer with the dequantized weight."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_int8.layer import Int8Linear
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def dense_layer(columns=12, rows=7, bias=True, transposed=False, seed=0):
    torch.manual_seed(seed)
    layer = Conv1D(rows, columns) if transposed else nn.Linear(columns, rows, bias=bias)
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def twin(layer):
    """A dense nn.Linear with the int8 layer's dequantized weight and bias."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight.data = layer.dense()
    if layer.bias is not None:
        made.bias.data = layer.bias.detach().clone()
    return made


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 33),
    lead=st.sampled_from([(), (1,), (4,), (2, 3), (0,)]),
    size=st.one_of(st.none(), st.integers(1, 40)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_input_gradient_are_those_of_the_dequantized_layer(rows, columns, lead, size, bias, seed):
    layer = Int8Linear.of(dense_layer(columns, rows, bias, seed=seed), size)
    dense = twin(layer)
    ours, theirs = (torch.randn(*lead, columns).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    weights = torch.randn(*lead, rows)
    outputs = layer(ours), dense(theirs)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_a_dense_layer_and_its_int8_layer_nearly_agree(transposed):
    dense = dense_layer(64, 48, transposed=transposed)
    layer, states = Int8Linear.of(dense), torch.randn(5, 64)
    expected = dense(states)
    assert layer(states).shape == expected.shape
    assert (layer(states) - expected).norm() / expected.norm() < 0.02
    assert (layer.in_features, layer.out_features, layer.transposed) == (64, 48, transposed)


def test_a_conv1d_becomes_the_layer_that_its_transposed_linear_becomes():
    conv = dense_layer(6, 9, transposed=True)
    linear = nn.Linear(6, 9)
    linear.weight.data, linear.bias.data = conv.weight.data.T, conv.bias.data
    ours, theirs = Int8Linear.of(conv), Int8Linear.of(linear)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.scales, theirs.scales)


def test_the_graph_keeps_the_codes_and_no_dense_weight_nor_input():
    layer = Int8Linear.of(dense_layer(64, 32, bias=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 64).requires_grad_()).sum().backward()
    assert {(t.dtype, t.data_ptr()) for t in kept} == {(t.dtype, t.data_ptr()) for t in (layer.weight, layer.scales)}


def test_a_gradient_reaches_a_bias_that_trains():
    layer = Int8Linear.of(dense_layer())
    layer(torch.randn(5, 12)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((7,), 5.0))


def test_only_the_bias_is_a_parameter():
    layer = Int8Linear.of(dense_layer())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.weight.requires_grad and not layer.scales.requires_grad


@pytest.mark.parametrize("size", [None, 16])
def test_it_holds_a_byte_for_a_weight_and_four_for_a_scale(size):
    layer = Int8Linear.of(dense_layer(64, 32, bias=False), size)
    groups = 64 // (size or 64)
    assert sum(t.numel() * t.element_size() for t in layer.state_dict().values()) == 64 * 32 + 4 * 32 * groups


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_computes_in_the_dtype_of_its_input(dtype):
    layer = Int8Linear.of(dense_layer(bias=False))
    states = torch.randn(3, 12).to(dtype)
    assert torch.equal(layer(states), F.linear(states, layer.dense().to(dtype)))


def test_under_autocast_it_computes_in_autocasts_dtype_and_the_gradient_keeps_the_inputs():
    layer = Int8Linear.of(dense_layer())
    states = torch.randn(3, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(states)
    output.float().sum().backward()
    assert (output.dtype, states.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(states.grad, layer.dense().sum(0).expand(3, 12), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_a_change_of_dtype_leaves_scales_in_float32_and_codes_in_int8(change):
    layer = Int8Linear.of(dense_layer())
    before = copy.deepcopy(layer.state_dict())
    change(nn.Sequential(layer))
    assert torch.equal(layer.scales, before["scales"]) and layer.scales.dtype == torch.float32
    assert torch.equal(layer.weight, before["weight"]) and layer.weight.dtype == torch.int8


def test_it_moves_to_the_meta_device_and_back_to_memory():
    layer = Int8Linear.of(dense_layer()).to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    state = Int8Linear.of(dense_layer(seed=4)).state_dict()
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer.scales, state["scales"])


def test_a_state_dict_gives_the_same_layer_again():
    source, target = Int8Linear.of(dense_layer(), 5), Int8Linear.of(dense_layer(seed=1), 5)
    target.load_state_dict(source.state_dict())
    states = torch.randn(4, 12)
    assert torch.equal(source(states), target(states))


def test_putting_its_own_weight_back_changes_no_bit():
    layer = Int8Linear.of(dense_layer(), 5)
    before = copy.deepcopy(layer.state_dict())
    layer.put(layer.dense())
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_a_weight_changed_between_forward_and_backward_is_noticed():
    layer = Int8Linear.of(dense_layer())
    loss = layer(torch.randn(2, 12, requires_grad=True)).sum()
    layer.put(torch.randn(7, 12))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_activation_checkpointing_gives_the_same_gradient():
    layer, states = Int8Linear.of(dense_layer()), torch.randn(3, 12)
    gradients = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        leaf = states.clone().requires_grad_()
        run(leaf).pow(2).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
