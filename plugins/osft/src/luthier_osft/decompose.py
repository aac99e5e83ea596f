"""Decompose a weight by its singular values into preserved and trained directions."""

from __future__ import annotations

import hashlib

import torch
from luthier import Context
from torch import Tensor

from luthier_osft.complement import complement_tensors

VERSION = 1  # of the cached tensors; part of their key
CONDITIONED = 1e-10  # smallest over largest eigenvalue of W^T W from which W v is orthogonal to the others to 1e-11


def hash_weight(weight: Tensor) -> str:
    """Return the SHA-256 of a weight's shape, dtype and values."""
    digest = hashlib.sha256(f"{list(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def decompose_cached(weight: Tensor, rank: int, context: Context, *, tails: bool) -> dict[str, Tensor]:
    """Return `decompose` of a weight, cached on disk under the weight's hash."""
    key = f"luthier-osft {VERSION} {hash_weight(weight)} {rank} {tails}"
    tensors = context.cache(key, lambda: decompose(weight, rank, tails=tails))
    return {name: tensor.to(weight.device) for name, tensor in tensors.items()}


@torch.no_grad()
def decompose(weight: Tensor, rank: int, *, tails: bool = False) -> dict[str, Tensor]:
    """Return the complements of the first `rank` left and right singular vectors of a weight [out, in].

    The names are those of `complement_tensors` after `out.` and `in.`. With `tails`, the triplets of the other singular
    values follow: `tail.out` [out, r], `tail.values` [r], `tail.in` [r, in]. They are computed in float64, and returned
    in the dtype of the weight.

    The right vectors are eigenvectors of W^T W (or the left ones of W W^T, if that is smaller). The vectors of the
    other side are W V, orthonormalised from the largest direction to the smallest, so that they match even if singular
    values are equal or zero. For a square weight that is far from singular only the smallest ones of W V are needed.
    """
    tall = weight.shape[0] >= weight.shape[1]
    long = (weight if tall else weight.T).to(_wide_place(weight), torch.float64)  # [long, short]
    squares, vectors = torch.linalg.eigh(long.T @ long)
    vectors = vectors.flip(1)  # [short, short], the largest first
    head, tail = vectors[:, :rank], vectors[:, rank:]
    is_basis = 0 < tail.shape[1] <= rank  # the short side stores the basis itself
    near = {"basis": tail} if is_basis else complement_tensors(head)
    if is_basis and long.shape[0] == long.shape[1] and squares[0] > CONDITIONED * squares[-1]:
        far = {"basis": torch.linalg.qr(long @ tail).Q}
    else:
        far = complement_tensors(long @ head)
    outer, inner = (far, near) if tall else (near, far)
    tensors = {f"out.{name}": tensor for name, tensor in outer.items()}
    tensors |= {f"in.{name}": tensor for name, tensor in inner.items()}
    if tails:
        left, values = _paired(long, head, tail)
        left, right = (left, tail) if tall else (tail, left)
        tensors |= {"tail.out": left, "tail.values": values, "tail.in": right.T}
    return {name: tensor.to(weight.device, weight.dtype).contiguous() for name, tensor in tensors.items()}


def _paired(long: Tensor, head: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors [long, r] that match the last ones of the short side, and their singular values [r]."""
    head_basis = torch.linalg.qr(long @ head).Q
    moved = long @ tail
    moved = moved - head_basis @ (head_basis.T @ moved)
    values = torch.linalg.vector_norm(moved, dim=0)
    return torch.where(values > 0, moved / values, 0.0), values


def _wide_place(weight: Tensor) -> torch.device:
    """Return the device of the weight, or the CPU if it has no float64."""
    return torch.device("cpu") if weight.device.type == "mps" else weight.device
