"""Optimizer kernels under the interpreter against plain torch."""

import pytest
import torch
from luthier_kernels import only_implementation
from luthier_kernels.optimizers import step_eight_bits, step_floats
from luthier_kernels.optimizers.arithmetic import Rates, encode_moments

RATES = Rates.at_step(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)


@pytest.mark.parametrize("total", [1, 255, 257, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", [None, 12345])
def test_a_step(total, dtype, key):
    p, g, m, v = torch.randn(total).to(dtype), torch.randn(total), torch.randn(total), torch.rand(total)
    codes, scales = encode_moments(m, v)
    made = []
    for name in ("torch", "triton"):
        with only_implementation(name):
            eight = [t.clone() for t in (p, *codes, *scales)]
            step_eight_bits(eight[0], g, (eight[1], eight[2]), (eight[3], eight[4]), RATES, key)
            single = [t.clone() for t in (p, m, v)]
            step_floats(single[0], g, (single[1], single[2]), RATES, key)
            made.append([*eight, *single])
    for one, other in zip(*made, strict=True):
        if one.dtype in (torch.int8, torch.uint8):
            assert (one.int() - other.int()).abs().max() <= 1
        else:  # the interpreter cuts bfloat16 where a GPU rounds
            near = 2**-7 if one.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(one.float(), other.float(), rtol=near, atol=1e-5)
