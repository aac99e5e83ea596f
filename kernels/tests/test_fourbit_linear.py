"""The linear layer over a 4-bit weight: values, the gradient to its input, memory, tracing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import FourBitWeight, multiply_fourbit
from luthier_kernels.fourbit.linear import reference_multiply
from luthier_kernels.scratch import borrow_scratch, free_scratch


def a_layer(rows, columns, seed=0, **format_):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return FourBitWeight.from_weight(weight, **format_)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 33),
    columns=st.integers(1, 130),
    lead=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_output_and_gradient_are_those_of_the_dequantized_layer(rows, columns, lead, kind, nested, dtype):
    weight = a_layer(rows, columns, kind=kind, double_quantization=nested)
    ours, theirs = (torch.ones(*lead, columns, dtype=dtype).cumsum(-1).requires_grad_() for _ in range(2))
    output = multiply_fourbit(ours, weight.arguments())
    expected = reference_multiply(theirs, weight.dequantize())
    assert output.dtype is dtype
    _agree_but_for_rounding(output, expected)
    upstream = torch.ones_like(output).cumsum(-1)
    output.backward(upstream)
    expected.backward(upstream)
    _agree_but_for_rounding(ours.grad, theirs.grad)


def _agree_but_for_rounding(ours, theirs):
    """The order of a product's sum depends on where in memory its factors lie."""
    rounding = 8 * torch.finfo(theirs.dtype).eps
    largest = theirs.detach().abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * largest)


def test_the_graph_keeps_the_packed_weight_and_nothing_dense():
    weight, kept = a_layer(64, 128), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multiply_fourbit(torch.randn(3, 128, requires_grad=True), weight.arguments()).sum().backward()
    own = [weight.packed, weight.scales, weight.nested, weight.offset]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in own}


def test_under_autocast_it_computes_in_its_dtype():
    states = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = multiply_fourbit(states, a_layer(8, 64).arguments())
    output.sum().backward()
    assert (output.dtype, states.grad.dtype) == (torch.bfloat16, torch.float32)


def test_it_is_traced_whole_by_compile_with_the_same_values():
    weight = a_layer(32, 64)

    def step(states):
        return multiply_fourbit(states * 2, weight.arguments()).relu().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (step, compiled):
        states = torch.ones(4, 64).cumsum(1).requires_grad_()
        run(states).backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)


def test_torch_finds_its_registration_sound():
    weight = a_layer(8, 64)
    from luthier_kernels.fourbit import dequantize, linear, quantize

    states = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(linear.FORWARD, (states, *weight.arguments()))
    torch.library.opcheck(linear.BACKWARD, (torch.randn(3, 8), *weight.arguments()))
    torch.library.opcheck(quantize.OPERATION, (torch.randn(70), "nf4", 64))
    torch.library.opcheck(dequantize.OPERATION, (*weight.arguments(), torch.float32))


def test_a_second_derivative_is_refused():
    states = torch.randn(2, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        multiply_fourbit(states, a_layer(4, 64).arguments()).pow(2).sum(), states, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no derivative of this order"):
        gradient.sum().backward()


def test_scratch_is_the_same_memory_again_and_can_be_given_back():
    free_scratch()
    large = borrow_scratch((100,), torch.float32, torch.device("cpu"))
    small = borrow_scratch((3, 4), torch.float32, torch.device("cpu"))
    assert small.data_ptr() == large.data_ptr() and small.shape == (3, 4)
    assert borrow_scratch((4,), torch.bfloat16, torch.device("cpu")).data_ptr() != large.data_ptr()
    free_scratch()


def test_activation_checkpointing_gives_the_same_gradient():
    weight, gradients = a_layer(16, 64), []
    for recompute in (False, True):
        states = torch.ones(3, 64).cumsum(0).requires_grad_()

        def layer(x):
            return multiply_fourbit(multiply_fourbit(x, weight.arguments()).tanh(), a_layer(64, 16).arguments())

        output = torch.utils.checkpoint.checkpoint(layer, states, use_reentrant=False) if recompute else layer(states)
        output.pow(2).sum().backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)
