"""The orthogonal complement of a subspace on one side of a weight: a dense basis, or reflectors if smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class Complement(nn.Module):
    """An orthonormal basis Q [n, n - k] of the complement of k directions, stored in one of three ways.

    - k = 0: Q is the identity, and nothing is stored.
    - `basis` [n, n - k]: Q itself, if it is not larger than the directions.
    - `vectors` Y [n, k] and `factor` T [k, k]: Householder's reflectors in the compact WY form of Schreiber and
      Van Loan (1989), whose product I - Y T Y^T has Q as its last n - k columns.
    """

    basis: Tensor
    vectors: Tensor
    factor: Tensor

    def __init__(self, size: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.size = size
        for name in sorted(tensors):  # parameters, so that they are sharded
            self.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))

    @property
    def num_directions(self) -> int:
        """The number k of directions to which Q is orthogonal."""
        if hasattr(self, "basis"):
            return self.size - self.basis.shape[1]
        return self.factor.shape[0] if hasattr(self, "factor") else 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors, by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def expand(self, coordinates: Tensor) -> Tensor:  # [..., n - k] -> [..., n]
        """Return Q c for each row c."""
        if hasattr(self, "basis"):
            return functional.linear(coordinates, _like(self.basis, coordinates))
        if not hasattr(self, "vectors"):
            return coordinates
        vectors, factor = _like(self.vectors, coordinates), _like(self.factor, coordinates)
        k = factor.shape[0]
        inner = functional.linear(functional.linear(coordinates, vectors[k:].T), factor)
        return functional.pad(coordinates, (k, 0)) - functional.linear(inner, vectors).to(coordinates.dtype)

    def project(self, rows: Tensor) -> Tensor:  # [..., n] -> [..., n - k]
        """Return Q^T x for each row x."""
        if hasattr(self, "basis"):
            return functional.linear(rows, _like(self.basis, rows).T)
        if not hasattr(self, "vectors"):
            return rows
        vectors, factor = _like(self.vectors, rows), _like(self.factor, rows)
        k = factor.shape[0]
        inner = functional.linear(functional.linear(rows, vectors.T), factor.T)
        return rows[..., k:] - functional.linear(inner, vectors[k:]).to(rows.dtype)

    def keep(self, rows: Tensor) -> Tensor:  # [..., n] -> [..., n]
        """Return Q Q^T x for each row x.

        From reflectors it is x - H H^T x, where H = (I - Y T Y^T) I_k are the directions: two products with Y.
        """
        if hasattr(self, "basis"):
            return self.expand(self.project(rows))
        if not hasattr(self, "vectors"):
            return rows
        vectors, factor = _like(self.vectors, rows), _like(self.factor, rows)
        k = factor.shape[0]
        inner = functional.linear(functional.linear(rows, vectors.T), factor.T)
        found = rows[..., :k] - functional.linear(inner, vectors[:k])  # H^T x
        inner = functional.linear(functional.linear(found, vectors[:k].T), factor)
        return rows - functional.pad(found, (0, self.size - k)) + functional.linear(inner, vectors).to(rows.dtype)


def complement_shapes(size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors for the complement of `rank` directions of `size`."""
    if rank == 0:
        return {}
    if size - rank <= rank:
        return {"basis": (size, size - rank)}
    return {"vectors": (size, rank), "factor": (rank, rank)}


def complement_tensors(directions: Tensor) -> dict[str, Tensor]:
    """Return the tensors for the complement of the span of [n, k] columns, in their dtype."""
    size, rank = directions.shape
    if rank == 0:
        return {}
    packed, scales = torch.geqrf(directions)
    vectors = packed.tril(-1)
    vectors.diagonal().fill_(1.0)
    upper = (vectors.T @ vectors).triu(1)
    identity = torch.eye(rank, dtype=vectors.dtype, device=vectors.device)
    factor = torch.linalg.solve_triangular(identity + scales[:, None] * upper, scales.diag(), upper=True)
    if size - rank > rank:
        return {"vectors": vectors, "factor": factor}
    basis = -vectors @ (factor @ vectors[rank:].T)
    basis[rank:].diagonal().add_(1.0)
    return {"basis": basis}


def _like(stored: Tensor, rows: Tensor) -> Tensor:
    """Return the stored tensor in the dtype in which the rows are computed."""
    return stored.to(rows.dtype)
