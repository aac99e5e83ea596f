"""The values of 4-bit and 8-bit codes, and the points between them at which the nearest code changes."""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

# fmt: off
NF4: Final = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
              0.7229568362236023, 1.0)
FP4: Final = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
              0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5,
              -0.1666666716337204, -0.25)
ORDERS: Final = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}  # ascending
# fmt: on
VALUES: Final = {"nf4": NF4, "fp4": FP4}
BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_format(kind: str, block_size: int) -> None:
    """Raise ValueError unless `kind` is nf4 or fp4 and the block size is one that bitsandbytes has."""
    if kind not in VALUES:
        raise ValueError(f"4-bit kind: expected 'nf4' or 'fp4', got {kind!r}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"4-bit block size: expected one of {BLOCK_SIZES}, got {block_size}")


@functools.cache
def code_values(kind: str, device: torch.device) -> Tensor:
    """Return the 16 values of the codes, float32."""
    with torch.no_grad():
        return torch.tensor(VALUES[kind], dtype=torch.float32).to(device)


@functools.cache
def decision_points(kind: str, device: torch.device) -> Tensor:
    """Return the 15 ascending points above which the next value is nearer, float32."""
    ascending = torch.tensor([VALUES[kind][code] for code in ORDERS[kind]], dtype=torch.float32)
    return ((ascending[:-1] + ascending[1:]) / 2).to(device)


@functools.cache
def code_order(kind: str, device: torch.device) -> Tensor:
    """Return the code of each of the 16 intervals between decision points, uint8."""
    return torch.tensor(ORDERS[kind], dtype=torch.uint8).to(device)


@functools.cache
def dynamic_map(device: torch.device, signed: bool = True) -> Tensor:
    """Return the 256 ascending values of an 8-bit dynamic code, float32 (Dettmers 2015, arXiv:1511.04561).

    It covers seven decades below 1. The larger the decade, the more bits the fraction has. Unsigned codes have one bit
    more for the fraction.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade + (0 if signed else 1)) + 1
        edges = torch.linspace(0.1, 1, steps, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        scaled = ((10 ** (-6 + decade)) * means).tolist()
        values += scaled + ([-value for value in scaled] if signed else [])
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)
