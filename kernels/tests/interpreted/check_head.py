"""The head's tiles under the interpreter against plain torch."""

import pytest
import torch
from luthier_kernels import only_implementation
from luthier_kernels.head import tiles

NEAR = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_tile_of_which_nothing_may_be_chosen_has_a_finite_peak(implementation):
    bend, label = tiles.Bend(torch.full((1500,), -torch.inf), 1.0, 0.0), torch.zeros(2)
    with only_implementation(implementation):
        made = torch.randn(2, 1500)
        peaks, masses = tiles.fold_tile(made, bend, torch.tensor([0, 5000]), 0, label, True)
    assert peaks.isfinite().all()
    assert masses.tolist() == [0.0, 0.0]
    assert not made.any()


@pytest.mark.parametrize("columns", [1, 1500])
@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(("has_bias", "cap"), [(False, 0.0), (True, 3.0)])
def test_tiles(columns, dtype, has_bias, cap):
    products, bias = torch.randn(4, columns).to(dtype) * 3, torch.randn(columns) if has_bias else None
    labels, bend = torch.tensor([100, 100 + columns - 1, 0, 100 + columns]), tiles.Bend(bias, 0.5, cap)
    made = []
    for implementation in ("torch", "triton"):
        with only_implementation(implementation):
            folded, sloped, label = products.clone(), products.clone(), torch.zeros(4)
            statistics = tiles.fold_tile(folded, bend, labels, 100, label, True)
            tiles.slope_tile(sloped, bend, labels, 100, torch.full((4,), 4.0), torch.tensor([1.0, -2.0, 0.0, 3.0]))
            made.append((*statistics, label, folded.float(), sloped.float()))
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, **NEAR[dtype])
