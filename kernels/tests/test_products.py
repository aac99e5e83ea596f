"""The product with a turned left factor, and the C function that turns it."""

import pytest
import torch
from luthier_kernels import products
from luthier_kernels.native import has_native


@pytest.mark.skipif(not has_native("transpose"), reason="no C compiler")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 32), (33, 65), (31, 64), (128, 32), (7, 97), (300, 1025)])
def test_a_turned_matrix_has_the_same_numbers(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns).bfloat16()
    assert torch.equal(products.turn_halves(matrix), matrix.t())


@pytest.mark.skipif(not has_native("transpose"), reason="no C compiler")
def test_a_turned_matrix_may_be_strided() -> None:
    matrix = torch.randn(90, 70).bfloat16().t()[3:40]
    assert torch.equal(products.turn_halves(matrix), matrix.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_is_that_of_the_turned_factor(dtype: torch.dtype) -> None:
    left, right = torch.randn(130, 70).to(dtype), torch.randn(130, 45).to(dtype)
    made = products.multiply_turned(left, right)
    assert made.dtype is dtype
    torch.testing.assert_close(made.double(), left.double().t() @ right.double(), rtol=2e-2, atol=5e-2)


def test_no_rows_and_no_columns_give_zeros_and_nothing() -> None:
    empty = torch.zeros(0, 4, dtype=torch.bfloat16)
    assert torch.equal(products.multiply_turned(empty, empty), torch.zeros(4, 4, dtype=torch.bfloat16))
    assert products.multiply_turned(torch.zeros(4, 0).bfloat16(), torch.zeros(4, 3).bfloat16()).shape == (0, 3)
