"""The algebra of SLAO between two tasks (Qiao and Mahdavi 2025, arXiv 2512.23017, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_rows(a: Tensor) -> Tensor:
    """Return a matrix [r, in] with orthonormal rows that span the rows of A [r, in].

    It is Q^T of A^T = Q R, with each column of Q multiplied by the sign of its diagonal entry of R. 0 counts as
    positive, so that no row vanishes. It is computed in float64 and returned in the dtype of A.
    """
    q, r = torch.linalg.qr(a.double().T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).T.to(a.dtype).contiguous()


def merge_share(rule: str, number: int) -> float:
    """Return the weight of task `number` (from 1) in the merge."""
    return {"inverse_sqrt": number**-0.5, "inverse": 1.0 / number, "replace": 1.0}[rule]


def merge_factor(merged: Tensor, trained: Tensor, share: float) -> Tensor:
    """Return B_merged + share (B_trained - B_merged), [out, r]."""
    return trained.clone() if share == 1.0 else merged + share * (trained - merged)


def relative_drift(merged: Tensor, moved: Tensor) -> float:
    """Return the change of B in a merge, relative to its norm. 0 if a B of zeros does not change."""
    distance, size = float((moved - merged).norm()), float(merged.norm())
    return distance / size if size else (0.0 if not distance else float("inf"))
