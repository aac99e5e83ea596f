"""Eigenvectors at one end of the spectrum: those of the whole decomposition, for any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_osft.complement import Complement
from luthier_osft.decompose import decompose
from luthier_osft.eigenvectors import outer_eigenpairs


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(size, seed):
    return torch.linalg.qr(drawn(size, size, seed=seed)).Q


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 20), st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_pairs_are_those_of_the_whole_decomposition(size, more, share, largest, equal, seed):
    matrix = drawn(size + more, size, seed=seed)
    if equal:
        matrix = torch.linalg.qr(matrix).Q
    count = round(size * share)
    pairs = outer_eigenpairs(matrix, count, largest=largest)
    values, vectors = pairs.values, pairs.vectors
    whole = torch.linalg.eigvalsh(matrix.T @ matrix)
    assert 0.999999 * whole[-1] <= pairs.bound <= 3.000001 * whole[-1]
    torch.testing.assert_close(values, whole[size - count :] if largest else whole[:count], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-11)
    torch.testing.assert_close(matrix.T @ (matrix @ vectors), vectors * values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(120, 120, 90), (120, 120, 40), (160, 90, 70), (90, 160, 70)])
def test_bases_of_a_float32_weight_leave_its_first_directions_alone(rows, columns, rank, smallest):
    """The spectrum falls to `smallest` times the largest value, as those of trained weights do in part."""
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), min(rows, columns), dtype=torch.float64)
    spread = torch.zeros(rows, columns, dtype=torch.float64)
    spread.diagonal().copy_(values)
    weight = (orthonormal(rows, 1) @ spread @ orthonormal(columns, 2)).float()
    if smallest == 1.0:
        weight = drawn(rows, columns, dtype=torch.float32)
    left, _, right = torch.linalg.svd(weight.double())
    bases = decompose(weight, rank)
    for side, size, directions in (("out", rows, left[:, :rank]), ("in", columns, right[:rank].T)):
        tensors = {name.partition(".")[2]: t for name, t in bases.items() if name.startswith(side)}
        basis = Complement(size, tensors).expand(torch.eye(size - rank)).T.double()
        assert (directions.T @ basis).norm(dim=0).max() < 1e-6


def test_weight_with_nan_is_an_error_as_before():
    weight = drawn(12, 8, dtype=torch.float32)
    weight[3, 3] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        decompose(weight, 6)
