"""What happens between tasks, to the letter of the paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_slao.algebra import merge_factor, merge_share, orthonormal_rows, relative_drift

sizes = st.tuples(st.integers(1, 6), st.integers(6, 20), st.integers(0, 10_000))


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_rows_become_orthonormal_and_span_what_they_spanned(drawn):
    rank, width, seed = drawn
    a = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
    found = orthonormal_rows(a)
    assert torch.allclose(found @ found.T, torch.eye(rank), atol=1e-6)
    rest = a - a @ found.T @ found
    assert float(rest.norm() / a.norm()) < 1e-5


def test_the_sign_is_that_of_the_diagonal_so_that_orthonormal_rows_stay_as_they_are():
    a = orthonormal_rows(torch.randn(4, 12, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(orthonormal_rows(a), a, atol=1e-6)
    assert torch.allclose(orthonormal_rows(-a), -a, atol=1e-6)


def test_a_row_of_zeros_does_not_vanish():
    a = torch.zeros(3, 5)
    a[0, 0] = 2.0
    found = orthonormal_rows(a)
    assert torch.allclose(found @ found.T, torch.eye(3), atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "shares"),
    [("inverse_sqrt", [1, 2**-0.5, 3**-0.5]), ("inverse", [1, 1 / 2, 1 / 3]), ("replace", [1, 1, 1])],
)
def test_the_share_of_a_task_follows_from_its_number(rule, shares):
    assert [merge_share(rule, number) for number in (1, 2, 3)] == shares


def test_b_moves_by_exactly_its_share_of_the_difference():
    merged, trained = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(merge_factor(merged, trained, 0.5), merged + 0.5 * (trained - merged))
    assert torch.equal(merge_factor(merged, trained, 1.0), trained)


def test_drift_is_relative_to_what_is_merged():
    assert relative_drift(torch.ones(2, 2), 2 * torch.ones(2, 2)) == pytest.approx(1.0)
    assert relative_drift(torch.zeros(2), torch.zeros(2)) == 0.0
