"""Packed ternary layouts: round trips, the bytes of transformers and gguf, and products from them."""

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import multiply_packed, multiply_ternary, only_implementation, quantize_ternary
from luthier_kernels.native import has_native
from luthier_kernels.ternary import packing

IMPLEMENTATIONS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not has_native("ternary"), reason="no compiler")),
]


def some_codes(rows, columns, seed=0):
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@given(rows=st.integers(1, 9), columns=st.integers(1, 600), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_what_is_packed_is_unpacked_in_every_layout(rows, columns, seed):
    codes, wide = some_codes(4 * rows, columns, seed), some_codes(rows, 256 * (columns % 3 + 1), seed)
    assert torch.equal(packing.unpack_rows(packing.pack_rows(codes)), codes)
    assert torch.equal(packing.unpack_columns(packing.pack_columns(codes), columns), codes)
    assert torch.equal(packing.unpack_i2s(packing.pack_i2s(wide), tuple(wide.shape)), wide)
    scales = torch.rand(rows, wide.shape[1] // 256).half().float()
    for pack, unpack in ((packing.pack_tq1, packing.unpack_tq1), (packing.pack_tq2, packing.unpack_tq2)):
        again, read = unpack(pack(wide, scales))
        assert torch.equal(again, wide) and torch.equal(read, scales)


def test_rows_are_packed_as_transformers_packs_them():
    from transformers.integrations.bitnet import pack_weights

    codes = some_codes(12, 7)
    assert torch.equal(packing.pack_rows(codes), pack_weights(codes.clone()))


@pytest.mark.parametrize(("kind", "pack"), [("TQ1_0", packing.pack_tq1), ("TQ2_0", packing.pack_tq2)])
def test_ggufs_bytes_are_those_of_gguf(kind, pack):
    codes = some_codes(6, 512)
    codes[:, :2] = 1  # no block without its largest value
    codes[:, 256] = -1
    scales = torch.tensor([0.5, 2.0]).expand(6, 2)
    dense = codes * scales.repeat_interleave(256, 1)
    theirs = gguf.quantize(dense.numpy(), GGMLQuantizationType[kind])
    ours = pack(codes, scales)
    assert numpy.array_equal(ours.numpy(), theirs)
    assert numpy.array_equal(gguf.dequantize(ours.numpy(), GGMLQuantizationType[kind]), dense.numpy())


def test_bitnet_cpp_has_the_first_of_a_block_in_the_highest_bits():
    codes = torch.full((1, 128), -1, dtype=torch.int8)
    codes[0, 1], codes[0, 33], codes[0, 97] = 1, 0, 1
    assert packing.pack_i2s(codes).tolist() == [0, 0b10_01_00_10, *[0] * 30]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8), columns=st.integers(1, 600), outputs=st.integers(1, 30),
    granularity=st.sampled_from(["tensor", "row"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_packed_product_is_the_training_layers_bit_for_bit(
    implementation, rows, columns, outputs, granularity, dtype
):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, columns, generator=generator)
    states = torch.randn(rows, columns, generator=generator).to(dtype)
    codes, scales = quantize_ternary(weight, granularity)
    expected = multiply_ternary(states, weight, codes, scales, granularity)
    with only_implementation(implementation):
        ours = multiply_packed(states, packing.pack_columns(codes), scales)
    assert torch.equal(ours, expected)


def test_many_rows_are_multiplied_from_unpacked_codes():
    weight, states = torch.randn(5, 300), torch.randn(40, 300)
    codes, scales = quantize_ternary(weight)
    ours = multiply_packed(states, packing.pack_columns(codes), scales)
    assert torch.equal(ours, multiply_ternary(states, weight, codes, scales))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.pack_rows(some_codes(5, 8)), "5 outputs are not divisible by 4"),
        (lambda: packing.pack_i2s(some_codes(3, 8)), "24 weights do not fill blocks of 128"),
        (lambda: packing.pack_tq2(some_codes(3, 100), torch.ones(3, 1)), "100 inputs do not fill blocks of 256"),
        (lambda: packing.unpack_tq1(torch.zeros(2, 55, dtype=torch.uint8)), "55 bytes of a row"),
    ],
)
def test_sizes_that_a_layout_does_not_have_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
