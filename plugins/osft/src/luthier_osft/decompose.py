"""Decompose a weight by its singular values into preserved and trained directions."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from luthier import Context
from torch import Tensor

from luthier_osft.complement import Complement, complement_shapes, complement_tensors
from luthier_osft.eigenvectors import outer_eigenpairs

VERSION = 2  # of the cached tensors; part of their key
Sides = tuple[dict[str, Tensor], dict[str, Tensor]]  # tensors of complements: of the short side, of the long one
CONDITIONED = 1e-10  # eigenvalue of W^T W over the largest from which W v is orthogonal to the others to 1e-11


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
def decompose_once(weight: Tensor, rank: int, context: Context, *, tails: bool) -> dict[str, Tensor]:
    """Return rank 0's decomposition of a weight that every rank has, because another processor may round differently.

    This is a collective if there are several ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return decompose_cached(weight, rank, context, tails=tails)
    if dist.get_rank() == 0:
        tensors = decompose_cached(weight, rank, context, tails=tails)
    else:
        shapes = decomposed_shapes(weight, rank, tails=tails)
        tensors = {name: weight.new_empty(shape) for name, shape in shapes.items()}
    for name in sorted(tensors):
        dist.broadcast(tensors[name], src=0)
    return tensors


def decomposed_shapes(weight: Tensor, rank: int, *, tails: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `decompose` returns."""
    rows, columns = weight.shape
    sides = {"out": complement_shapes(rows, rank), "in": complement_shapes(columns, rank)}
    shapes = {f"{side}.{name}": shape for side, made in sides.items() for name, shape in made.items()}
    count = min(rows, columns) - rank
    return (
        {**shapes, "tail.out": (rows, count), "tail.values": (count,), "tail.in": (count, columns)} if tails else shapes
    )


@torch.no_grad()
def decompose(weight: Tensor, rank: int, *, tails: bool = False) -> dict[str, Tensor]:
    """Return the complements of the first `rank` left and right singular vectors of a weight [out, in].

    The names are those of `complement_tensors` after `out.` and `in.`. With `tails`, the triplets of the other singular
    values follow: `tail.out` [out, r], `tail.values` [r], `tail.in` [r, in]. They are computed in float64, and returned
    in the dtype of the weight.

    The right vectors are eigenvectors of W^T W (or the left ones of W W^T, if that is smaller): the last ones, or the
    first ones if those are fewer. The vectors of the other side are W V, orthonormalised from the largest direction to
    the smallest, so that they match even if singular values are equal or zero. All eigenvectors are needed for that
    only if some of the preserved directions may be next to zero.
    """
    tall = weight.shape[0] >= weight.shape[1]
    long = (weight if tall else weight.T).to(_wide_place(weight), torch.float64)  # [long, short]
    sides = None if tails else _partial_sides(long, rank)
    if sides is not None:
        tensors = _name_sides(sides, tall)
    else:
        head, tail = _split_directions(long, rank)
        near = {"basis": tail} if 0 < tail.shape[1] <= rank else complement_tensors(head)
        tensors = _name_sides((near, complement_tensors(long @ head)), tall)
        tensors |= _name_tails(long, head, tail, tall) if tails else {}
    return {name: tensor.to(weight.device, weight.dtype).contiguous() for name, tensor in tensors.items()}


def _name_sides(sides: Sides, tall: bool) -> dict[str, Tensor]:
    """Return the tensors of the short and of the long side under the names of `decompose`."""
    outer, inner = reversed(sides) if tall else sides
    tensors = {f"out.{name}": tensor for name, tensor in outer.items()}
    return tensors | {f"in.{name}": tensor for name, tensor in inner.items()}


def _split_directions(long: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first `rank` vectors of the short side and the others, from the largest to the smallest."""
    vectors = outer_eigenpairs(long, long.shape[1], largest=True).vectors.flip(1)
    return vectors[:, :rank], vectors[:, rank:]


def _partial_sides(long: Tensor, rank: int) -> Sides | None:
    """Return the complements on the short and on the long side, or None where they need all directions."""
    count = long.shape[1] - rank
    if not 0 < count <= rank:  # the directions themselves are fewer
        head = outer_eigenpairs(long, rank, largest=True).vectors.flip(1)
        return complement_tensors(head), complement_tensors(long @ head)
    pairs = outer_eigenpairs(long, count, largest=False)
    tail, least = {"basis": pairs.vectors}, CONDITIONED * pairs.bound
    if long.shape[0] == long.shape[1] and pairs.values[0] > least:
        return tail, {"basis": torch.linalg.qr(long @ pairs.vectors).Q}
    if pairs.values[-1] <= least:
        return None
    others = Complement(long.shape[1], complement_tensors(pairs.vectors)).project(long)
    return tail, complement_tensors(others)


def _name_tails(long: Tensor, head: Tensor, tail: Tensor, tall: bool) -> dict[str, Tensor]:
    """Return the other triplets under the names of `decompose`."""
    far, values = _paired(long, head, tail)
    left, right = (far, tail) if tall else (tail, far)
    return {"tail.out": left, "tail.values": values, "tail.in": right.T}


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
