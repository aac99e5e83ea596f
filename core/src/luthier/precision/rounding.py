"""Rounding float32 to bfloat16: without losing what it cuts off, or by chance so that nothing is lost on average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

HALF: Final = 0x8000  # half of the lowest bit that bfloat16 keeps: bfloat16 is the upper half of float32
PIECE: Final = 1 << 20  # numbers of a weight that are looked at together, 4 MiB in float32
MOST: Final = 64  # pieces of one weight at most: for the largest ones a sixty-fourth more memory is little


def split_halves(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a finite float32 tensor as its nearest bfloat16 and, in int16, what that cuts off; None where that is
    nothing.

    The two take the room of the one, and `join_halves` gives it back to the bit. Halves are rounded away from zero, so
    that the rest is within int16.
    """
    if all(_is_exact(piece) for piece in cut_pieces(x)):  # for example if the model was published in bfloat16
        return x.to(torch.bfloat16), None
    top, rest = (torch.empty_like(x, dtype=torch.int16, memory_format=torch.contiguous_format) for _ in range(2))
    for piece, top_piece, rest_piece in zip(cut_pieces(x), cut_pieces(top), cut_pieces(rest), strict=True):
        bits = piece.view(torch.int32)
        high = (bits + HALF).bitwise_right_shift_(16)
        top_piece.copy_(high)
        rest_piece.copy_(torch.sub(bits, high.bitwise_left_shift_(16), out=high))
    return top.view(torch.bfloat16), rest


def cut_pieces(x: Tensor) -> Iterator[Tensor]:
    """Yield the numbers of a tensor in pieces [n], so that what is made of one takes little memory.

    They are views of the tensor if it is contiguous, else of its copy.
    """
    flat = x.reshape(-1)
    return iter(flat.split(max(PIECE, -(-flat.numel() // MOST))))


def _is_exact(piece: Tensor) -> bool:
    return bool((piece.to(torch.bfloat16).float() == piece).all())


def join_halves(top: Tensor, rest: Tensor | None) -> Tensor:
    """Return the float32 tensor that `split_halves` cut."""
    if rest is None:
        return top.float()
    high = top.view(torch.int16).to(torch.int32) << 16
    return high.add_(rest.to(top.device)).view(torch.float32)


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a float32 tensor in bfloat16, each entry up or down with the chance that makes the mean exact.

    Gupta et al. 2015, arXiv 1502.02551: an update smaller than a step of bfloat16 is made now and then instead of
    never. Entries that bfloat16 holds stay as they are.
    """
    drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    chance = drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    bits = (x.contiguous().view(torch.int32) + chance).add_(HALF)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)
