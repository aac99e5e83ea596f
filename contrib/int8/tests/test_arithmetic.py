"""The arithmetic of int8: its error bound, its fixed point, and odd shapes and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_int8.arithmetic import dequantize, quantize

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))
GROUPS = st.one_of(st.none(), st.integers(1, 50))


def drawn(shape, seed, scale=1.0, outliers=False):
    torch.manual_seed(seed)
    weight = torch.randn(shape) * scale
    if outliers:
        weight.view(-1)[::7] *= 100
    return weight


def naive(weight, size):
    """Group by group and weight by weight, as the definition reads."""
    rows, columns = weight.shape
    codes, scales, values = weight.clone(), [], weight.clone()
    for row in range(rows):
        for start in range(0, columns, size):
            group = weight[row, start : start + size]
            scale = group.abs().max() / 127
            scales.append(scale)
            for i in range(len(group)):
                code = torch.round(group[i] / scale) if scale > 0 else torch.tensor(0.0)
                codes[row, start + i] = code
                values[row, start + i] = code * scale
    return codes.to(torch.int8), torch.stack(scales).view(rows, -1), values


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, size=GROUPS, seed=st.integers(0, 999), power=st.integers(-20, 20), outliers=st.booleans())
def test_no_weight_is_further_than_a_254th_of_its_groups_largest(shape, size, seed, power, outliers):
    weight = drawn(shape, seed, 2.0**power, outliers)
    error = (dequantize(*quantize(weight, size), size).double() - weight.double()).abs()
    for start in range(0, shape[1], size or shape[1]):
        group = slice(start, start + (size or shape[1]))
        bound = weight[:, group].double().abs().amax(1, keepdim=True) / 254
        assert (error[:, group] <= bound * (1 + 1e-5)).all()  # float32 rounds the scale and the product


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, size=GROUPS, seed=st.integers(0, 999))
def test_it_is_what_the_definition_says_bit_for_bit(shape, size, seed):
    weight = drawn(shape, seed)
    codes, scales = quantize(weight, size)
    expected_codes, expected_scales, values = naive(weight, size or shape[1])
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)
    assert torch.equal(dequantize(codes, scales, size), values)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, size=GROUPS, seed=st.integers(0, 9999), power=st.integers(-20, 20))
def test_quantizing_again_changes_no_bit(shape, size, seed, power):
    codes, scales = quantize(drawn(shape, seed, 2.0**power * 1.7), size)
    again = quantize(dequantize(codes, scales, size), size)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_is_read_and_scales_are_float32(dtype):
    weight = drawn((4, 10), 0).to(dtype)
    codes, scales = quantize(weight, 4)
    assert (codes.dtype, scales.dtype, tuple(scales.shape)) == (torch.int8, torch.float32, (4, 3))
    assert torch.equal(codes, quantize(weight.float(), 4)[0])


def test_a_row_of_zeros_stays_zero_without_nan():
    codes, scales = quantize(torch.zeros(2, 5))
    assert not codes.any() and not scales.any() and not dequantize(codes, scales).any()


def test_the_most_negative_code_is_never_used():
    codes, _ = quantize(torch.tensor([[-3.0, 1.0], [2.0, -2.0]]))
    assert codes.tolist() == [[-127, 42], [127, -127]]


def test_a_transposed_view_is_quantized_as_it_reads():
    weight = drawn((6, 8), 1).T
    assert torch.equal(quantize(weight)[0], quantize(weight.contiguous())[0])
