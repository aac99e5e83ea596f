"""4-bit kernels under the interpreter against plain torch."""

import pytest
import torch
from luthier_kernels import FourBitWeight, count_runs, forget_runs, only_implementation
from luthier_kernels.gpu import INTERPRETED

assert INTERPRETED
SHAPES = [(1,), (7, 13), (64, 64), (65,), (3, 4, 32), (5, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_bytes_and_scales(shape, kind, block_size):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        made = []
        for implementation in ("torch", "triton"):
            with only_implementation(implementation):
                made.append(FourBitWeight.from_weight(weight, kind, block_size, double_quantization=False))
        assert torch.equal(made[0].packed, made[1].packed) and torch.equal(made[0].scales, made[1].scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values(shape, nested, dtype):
    weight = FourBitWeight.from_weight(torch.randn(shape), double_quantization=nested)
    forget_runs()
    values = []
    for implementation in ("torch", "triton"):
        with only_implementation(implementation):
            values.append(weight.dequantize(dtype).float())
    assert count_runs()["dequantize_fourbit"] == {"torch": 1, "triton": 1}
    # the interpreter cuts bfloat16 where a GPU rounds: one unit in the last place
    torch.testing.assert_close(*values, rtol=2**-7 if dtype is torch.bfloat16 else 0, atol=0)
