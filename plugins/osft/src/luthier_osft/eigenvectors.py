"""Eigenvectors at one end of the spectrum of W^T W, without those of the rest."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(kw_only=True)
class Eigenpairs:
    """Eigenvalues [count], ascending, and eigenvectors [n, count] of a symmetric matrix [n, n], in float64.

    `bound` is at least the largest of all n eigenvalues, and at most three times as much.
    """

    values: Tensor
    vectors: Tensor
    bound: float


def outer_eigenpairs(matrix: Tensor, count: int, *, largest: bool) -> Eigenpairs:
    """Return `count` eigenpairs of W^T W at the end of its spectrum that `largest` names, for W [m, n] in float64.

    On a CPU W^T W is brought to tridiagonal form, and only `count` eigenvectors are computed and transformed back, by
    LAPACK's relatively robust representations (Dhillon, Parlett and Voemel 2006, ACM TOMS 32). torch has only the whole
    decomposition, which takes twice the time for a quarter of the eigenvectors.
    """
    size = matrix.shape[1]
    first = size - count if largest else 0
    if matrix.device.type == "cpu" and 0 < count < size:
        pairs = _partial_pairs(matrix, first, first + count - 1)
        if pairs is not None:
            return pairs
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    chosen = slice(first, first + count)
    return Eigenpairs(values=values[chosen], vectors=vectors[:, chosen], bound=float(values[-1]))


def _partial_pairs(matrix: Tensor, first: int, last: int) -> Eigenpairs | None:
    """Return the eigenpairs from `first` to `last`, or None if the matrix has NaN or LAPACK does not converge."""
    from scipy.linalg import LinAlgError, blas, eigh_tridiagonal, lapack

    square = blas.dsyrk(1.0, matrix.contiguous().numpy().T, lower=1)
    room = int(lapack.dsytrd_lwork(square.shape[0], lower=1)[0])
    reflectors, diagonal, below, scales, _ = lapack.dsytrd(square, lower=1, lwork=room, overwrite_a=1)
    discs, sides = torch.from_numpy(abs(diagonal)), torch.from_numpy(abs(below))
    discs[1:] += sides  # Gershgorin's bound
    discs[:-1] += sides
    if not discs.isfinite().all():
        return None
    wanted: dict[str, Any] = {"select": "i", "select_range": (first, last), "lapack_driver": "stemr"}
    try:
        values, vectors = eigh_tridiagonal(diagonal, below, **wanted)
    except LinAlgError:
        return None
    whole = torch.from_numpy(vectors)
    packed, factors = torch.from_numpy(reflectors)[1:, :-1], torch.from_numpy(scales)
    whole[1:] = torch.ormqr(packed, factors, whole[1:])
    return Eigenpairs(values=torch.from_numpy(values), vectors=whole, bound=float(discs.max()))
