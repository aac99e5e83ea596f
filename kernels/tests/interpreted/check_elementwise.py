"""Elementwise kernels under the interpreter against plain torch."""

import pytest
import torch
from luthier_kernels import count_runs, forget_runs, only_implementation
from luthier_kernels.elementwise import gates, norm, rope

NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}


def both(name, call, dtype):
    forget_runs()
    made = []
    for implementation in ("torch", "triton"):
        with only_implementation(implementation):
            made.append(call())
    assert count_runs()[name] == {"torch": 1, "triton": 1}
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one.float(), other.float(), **NEAR[dtype])


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (3, 4, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norms(shape, dtype, has_residual):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    residual = torch.randn(shape).to(dtype) if has_residual and dtype is torch.float32 else None
    both("normalize_rms", lambda: norm.FORWARD(x, residual, weight, 1e-5, 1.0), dtype)


@pytest.mark.parametrize("implementation", ["torch", "triton", "native"])
def test_a_sum_is_normalized_as_it_is_returned(implementation):
    x, residual, weight = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16(), torch.randn(64)
    with only_implementation(implementation):
        made, total, factors = norm.FORWARD(x, residual, weight, 1e-5, 1.0)
        alone, _, same = norm.FORWARD(total, None, weight, 1e-5, 1.0)
    assert torch.equal(made, alone)
    assert torch.equal(factors, same)
    # the interpreter rounds to bfloat16 towards zero, so that sums are not bit-equal
    torch.testing.assert_close(total.float(), x.float() + residual.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("half", [1, 5, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations(half, dtype):
    x, angles = torch.randn(6, 3, 2 * half).to(dtype), torch.randn(9, 2 * half)
    places = torch.tensor([0, 8, 3, 3, 1, 0])
    both("rotate_heads", lambda: (rope.OPERATION(x, angles.cos(), angles.sin(), places, -1.0),), dtype)


@pytest.mark.parametrize("kind", gates.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(kind, dtype):
    gate, up, gradient = (torch.randn(3, 700).to(dtype) for _ in range(3))
    both("gate_states", lambda: (gates.FORWARD(gate, up, kind),), dtype)
    both("gate_states_back", lambda: gates.BACKWARD(gradient, gate, up, kind), dtype)


@pytest.mark.parametrize("shape", [(1, 1), (66, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("summed", "trains"), [(False, True), (True, False), (True, True)])
def test_gradients_of_norms(shape, dtype, summed, trains):
    gradient, x, other = (torch.randn(shape).to(dtype) for _ in range(3))
    factors = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    given = (gradient, other if summed else None, x, torch.randn(shape[-1]), factors, 1.0, trains)
    both("normalize_rms_back", lambda: norm.BACKWARD(*given), dtype)
