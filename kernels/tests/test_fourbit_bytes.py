"""NF4 and FP4 against bitsandbytes: the same bytes, scales and values, and states read in both directions."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import FourBitWeight, only_implementation
from luthier_kernels.fourbit.codebooks import code_values, decision_points, dynamic_map
from luthier_kernels.native import has_native

CPU = torch.device("cpu")
IMPLEMENTATIONS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not has_native("fourbit"), reason="no compiler")),
]
shapes = st.one_of(
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 40), st.integers(1, 90)),
    st.sampled_from([(64, 64), (1, 1), (3, 64), (5, 13), (65,), (129, 3), (2, 3, 32)]),
)
settings_of_format = {"kind": st.sampled_from(["nf4", "fp4"]), "block_size": st.sampled_from([32, 64, 256, 4096])}


def a_weight(shape, seed, dtype=torch.float32, scale=1.0, kinds="plain"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    if kinds == "zeros":
        weight.view(-1)[: weight.numel() // 2] = 0
    if kinds == "outlier":
        weight.view(-1)[0] = 1e4
    return weight.to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
    kinds=st.sampled_from(["plain", "zeros", "outlier"]),
    nested=st.booleans(),
    **settings_of_format,
)
def test_bytes_scales_and_state_are_those_of_bitsandbytes(
    implementation, shape, seed, dtype, scale, kinds, nested, kind, block_size
):
    weight = a_weight(shape, seed, dtype, scale, kinds)
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=nested)
    with only_implementation(implementation):
        ours = FourBitWeight.from_weight(weight, kind, block_size, nested)
    written = {"": packed, **state.as_dict(packed=True)}
    tensors = ours.to_tensors()
    assert tensors.keys() == written.keys()
    assert {name: t for name, t in tensors.items() if not torch.equal(t, written[name])} == {}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    nested=st.booleans(),
    kind=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 256]),
)
def test_values_are_those_of_bitsandbytes(implementation, rows, blocks, seed, dtype, nested, kind, block_size):
    """Whole blocks in each row: of others its AVX-512 code takes the wrong scale (0.50.2)."""
    weight = a_weight((rows, blocks * block_size), seed, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=nested)
    with only_implementation(implementation):
        ours = FourBitWeight.from_weight(weight, kind, block_size, nested).dequantize(dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


def test_bitsandbytes_reads_what_is_written_and_its_own_is_read():
    weight = a_weight((32, 128), 3, torch.bfloat16)
    ours = FourBitWeight.from_weight(weight)
    tensors = ours.to_tensors()
    state = bnb.QuantState.from_dict({k: v for k, v in tensors.items() if k}, CPU)
    assert torch.equal(bnb.dequantize_4bit(tensors[""], state), ours.dequantize(torch.bfloat16))
    packed, theirs = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    read = FourBitWeight.from_tensors({"": packed, **theirs.as_dict(packed=True)})
    assert torch.equal(read.dequantize(), ours.dequantize())
    assert (read.shape, read.dtype, read.kind, read.block_size) == ((32, 128), torch.bfloat16, "nf4", 64)


def test_a_weight_that_bitsandbytes_stores_as_bfloat16_is_read():
    weight = a_weight((16, 64), 0)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    read = FourBitWeight.from_tensors({"": packed, **state.as_dict(packed=True)})
    assert torch.equal(read.packed, FourBitWeight.from_weight(weight, double_quantization=False).packed)


def test_the_tables_are_those_of_bitsandbytes():
    for kind in ("nf4", "fp4"):
        assert torch.equal(code_values(kind, CPU), bnb.get_4bit_type(kind, device="cpu"))
        assert (decision_points(kind, CPU).diff() >= 0).all()
    for signed in (True, False):
        assert torch.equal(dynamic_map(CPU, signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("absmax"), "incomplete"),
        (lambda t: t.update({"": t[""][:-3]}), r"packed has 1021 elements, expected 1024"),
        (lambda t: t.update(absmax=t["absmax"][:-1]), "absmax has 31"),
        (lambda t: t.update(nested_absmax=t["nested_absmax"].repeat(2)), "nested_absmax has 2"),
        (lambda t: t.update(quant_map=t["quant_map"] * 2), "quant_map is not the one of nf4"),
        (lambda t: t.update({"quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)}), "is not JSON"),
    ],
)
def test_a_damaged_state_is_refused_by_what_is_wrong(change, message):
    tensors = FourBitWeight.from_weight(a_weight((32, 64), 0)).to_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        FourBitWeight.from_tensors(tensors)


def test_sizes_and_kinds_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="block size"):
        FourBitWeight.from_weight(torch.randn(4, 4), block_size=48)
    with pytest.raises(ValueError, match="'nf4' or 'fp4'"):
        FourBitWeight.from_weight(torch.randn(4, 4), kind="int4")


def test_bytes_are_counted():
    weight = torch.zeros(256, 1024)
    assert FourBitWeight.from_weight(weight).count_bytes() * 8 / weight.numel() == pytest.approx(4.127, abs=1e-2)
    assert FourBitWeight.from_weight(weight, double_quantization=False).count_bytes() * 8 / weight.numel() == 4.5
