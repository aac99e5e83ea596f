"""Ternary kernels under the interpreter against plain torch."""

import pytest
import torch
from luthier_kernels import (
    count_runs,
    expand_codes,
    forget_runs,
    multiply_packed,
    only_implementation,
    quantize_activations,
    quantize_ternary,
)
from luthier_kernels.ternary import packing
from luthier_kernels.ternary.integers import multiply_integers

SHAPES = [(1, 1), (5, 17), (33, 130), (64, 300), (3, 1025)]


def both(call):
    """The results of plain torch and of Triton."""
    forget_runs()
    made = []
    for implementation in ("torch", "triton"):
        with only_implementation(implementation):
            made.append(call())
    assert {"torch", "triton"} in [set(runs) for runs in count_runs().values()]
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", 7])
@pytest.mark.parametrize("method", ["absmean", "twn"])
def test_codes_and_scales(shape, granularity, method):
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape).to(dtype)
        ours, theirs = both(lambda weight=weight: quantize_ternary(weight, granularity, method))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations(shape, dtype):
    states = torch.randn(shape).to(dtype) * 3
    ours, theirs = both(lambda: quantize_activations(states))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", 7])
def test_codes_times_scales(shape, granularity):
    codes, scales = quantize_ternary(torch.randn(shape), granularity)
    assert torch.equal(*both(lambda: expand_codes(codes, scales, granularity)))


@pytest.mark.parametrize("rows", [1, 30, 70])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (17, 65), (130, 200)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_integer_products(rows, outputs, columns, granularity):
    codes, scales = quantize_ternary(torch.randn(outputs, columns), granularity)
    rounded, steps = quantize_activations(torch.randn(rows, columns))
    assert torch.equal(*both(lambda: multiply_integers(rounded, codes, steps, scales, torch.float32)))


@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (17, 300), (40, 512)])
def test_packed_products(outputs, columns):
    codes, scales = quantize_ternary(torch.randn(outputs, columns), "row")
    packed, states = packing.pack_columns(codes), torch.randn(3, columns)
    assert torch.equal(*both(lambda: multiply_packed(states, packed, scales)))
