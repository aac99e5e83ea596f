"""4-bit quantization against its reference, in every implementation: values, layouts, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import (
    FourBitWeight,
    count_runs,
    dequantize_fourbit,
    forget_runs,
    only_implementation,
    quantize_fourbit,
)
from luthier_kernels.fourbit.quantize import reference_quantize


@settings(max_examples=40, deadline=None)
@given(total=st.integers(0, 700), seed=st.integers(0, 99), kind=st.sampled_from(["nf4", "fp4"]), bf16=st.booleans())
def test_every_implementation_gives_the_same(total, seed, kind, bf16):
    weight = torch.randn(total, generator=torch.Generator().manual_seed(seed))
    made = []
    for implementation in ("torch", None):
        with only_implementation(implementation) if implementation else torch.no_grad():
            packed, scales = quantize_fourbit(weight, kind)
            values = [
                dequantize_fourbit(packed, scales, (total,), dtype, kind) for dtype in (torch.float32, torch.bfloat16)
            ]
            made.append((packed, scales, *values))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_code_of_a_value_is_the_nearest_one(kind):
    weight = torch.randn(64 * 50)
    packed, scales = quantize_fourbit(weight, kind)
    scaled = weight.view(-1, 64) / scales[:, None]
    from luthier_kernels.fourbit.codebooks import code_values

    distance = (scaled[..., None] - code_values(kind, weight.device)).abs().amin(-1)
    chosen = (dequantize_fourbit(packed, scales, weight.shape, kind=kind).view(-1, 64) / scales[:, None] - scaled).abs()
    torch.testing.assert_close(chosen, distance, rtol=0, atol=1e-6)


def test_the_reference_in_float64_is_close_to_float32():
    weight = torch.randn(130, dtype=torch.float64)
    packed, scales = reference_quantize(weight, "nf4", 64)
    assert scales.dtype is torch.float64
    torch.testing.assert_close(scales.float(), quantize_fourbit(weight.float())[1])
    assert (packed == quantize_fourbit(weight.float())[0]).float().mean() > 0.98


def test_quantizing_what_was_dequantized_changes_nothing():
    weight = FourBitWeight.from_weight(torch.randn(40, 64), double_quantization=False)
    again = FourBitWeight.from_weight(weight.dequantize(), double_quantization=False)
    assert torch.equal(weight.packed, again.packed) and torch.equal(weight.scales, again.scales)


def test_a_strided_weight_is_quantized_as_its_copy():
    weight = torch.randn(64, 96)
    assert torch.equal(quantize_fourbit(weight.t())[0], quantize_fourbit(weight.t().contiguous())[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_rounded_from_float32(dtype):
    weight = FourBitWeight.from_weight(torch.randn(8, 64))
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


def test_scales_of_zero_give_zeros():
    weight = FourBitWeight.from_weight(torch.zeros(4, 64), double_quantization=False)
    assert torch.equal(weight.dequantize(), torch.zeros(4, 64))


def test_threads_change_nothing():
    weight = torch.randn(1 << 18)
    one = quantize_fourbit(weight)
    torch.set_num_threads(3)
    try:
        several = quantize_fourbit(weight)
        values = dequantize_fourbit(*several, weight.shape)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], several[0]) and torch.equal(values, dequantize_fourbit(*one, weight.shape))


def test_what_ran_is_counted():
    forget_runs()
    with only_implementation("torch"):
        quantize_fourbit(torch.randn(64))
    assert count_runs() == {"quantize_fourbit": {"torch": 1}}


def test_an_implementation_that_fails_is_logged_once_and_the_next_one_runs(caplog):
    from luthier_kernels.dispatch import run_first

    def fails():
        raise RuntimeError("no such instruction")

    forget_runs()
    for _ in range(2):
        assert run_first("an_operation", ("native", True, fails), ("torch", True, lambda: 7)) == 7
    assert [record.message for record in caplog.records if "no such instruction" in record.message] != []
    assert len(caplog.records) == 1
    assert count_runs() == {"an_operation": {"torch": 2}}
    with pytest.raises(RuntimeError, match="no such instruction"), only_implementation("native"):
        forget_runs()
        run_first("an_operation", ("native", True, fails), ("torch", True, lambda: 7))


def test_without_a_compiler_plain_torch_runs_and_says_so(monkeypatch, caplog):
    from luthier_kernels.native import build

    monkeypatch.setenv("PATH", "")
    assert build.load_source.__wrapped__("fourbit") is None
    assert "no C compiler" in caplog.text
