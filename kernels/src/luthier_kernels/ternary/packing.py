"""Byte layouts of ternary codes -1, 0, 1 [out, in] int8. Packing and unpacking is exact.

| layout | bytes | whose |
|---|---|---|
| rows | [out / 4, in] | transformers' BitNet: byte [r, c] holds rows r, r + out / 4, ... at bits 1:0, 3:2, 5:4, 7:6 |
| columns | [out, 64 ceil(in / 256)] | ours: byte p of a block of 256 columns holds p, p + 64, p + 128, p + 192 |
| i2_s | [out in / 4] | bitnet.cpp (x86): in blocks of 128, byte p holds p, p + 32, ... at bits 7:6 down to 1:0 |
| tq1_0 | [out, 54 in / 256] | GGUF: five trits a byte in base 3, then the float16 scale of the block |
| tq2_0 | [out, 66 in / 256] | GGUF: in halves of 128, byte p holds p, p + 32, p + 64, p + 96, then the float16 scale |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
TRITS = (81, 27, 9, 3, 1)


def pack_rows(codes: Tensor) -> Tensor:
    """Return transformers' layout [out / 4, in] uint8. ValueError if out is not divisible by four."""
    if codes.shape[0] % 4:
        raise ValueError(f"ternary rows: {codes.shape[0]} outputs are not divisible by 4")
    parts = (codes + 1).to(torch.uint8).view(4, -1, codes.shape[1])
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """Return the codes [out, in] of `pack_rows`."""
    return torch.cat([packed >> 2 * part & 3 for part in range(4)]).to(torch.int8) - 1


def pack_columns(codes: Tensor) -> Tensor:
    """Return our layout [out, 64 ceil(in / 256)] uint8, for `multiply_packed`, padded with zeros."""
    parts = _blocks(codes, BLOCK).view(codes.shape[0], -1, 4, BLOCK // 4)
    return _merge(parts).reshape(codes.shape[0], -1)


def unpack_columns(packed: Tensor, columns: int) -> Tensor:
    """Return the codes [out, columns] of `pack_columns`."""
    blocks = packed.view(packed.shape[0], -1, 1, BLOCK // 4)
    codes = torch.cat([blocks >> 2 * part & 3 for part in range(4)], 2).to(torch.int8) - 1
    return codes.view(packed.shape[0], -1)[:, :columns].contiguous()


def pack_i2s(codes: Tensor) -> Tensor:
    """Return bitnet.cpp's layout of the codes, without its scale. ValueError unless they fill blocks of 128."""
    if codes.numel() % 128:
        raise ValueError(f"i2_s: {codes.numel()} weights do not fill blocks of 128")
    return _merge((codes + 1).to(torch.uint8).view(-1, 4, 32).flip(1)).reshape(-1)


def unpack_i2s(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the codes of `pack_i2s`."""
    blocks = packed.view(-1, 1, 32)
    codes = torch.cat([blocks >> 2 * part & 3 for part in (3, 2, 1, 0)], 1)
    return codes.to(torch.int8).view(shape) - 1


def pack_tq2(codes: Tensor, scales: Tensor) -> Tensor:
    """Return GGUF's TQ2_0 [out, 66 in / 256] uint8; scales are broadcast to blocks [out, in / 256], as float16."""
    rows, blocks = _check_blocks(codes)
    halves = (codes + 1).to(torch.uint8).view(rows, blocks, 2, 4, 32)
    return _with_scales(_merge(halves).view(rows, blocks, 64), scales)


def unpack_tq2(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [out, in] and the scales [out, in / 256] float32 of `pack_tq2`."""
    bytes_, scales = _without_scales(packed, 66)
    rows, blocks = scales.shape
    halves = bytes_.view(rows, blocks, 2, 1, 32)
    codes = torch.cat([halves >> 2 * part & 3 for part in range(4)], 3)
    return codes.to(torch.int8).view(rows, -1) - 1, scales


def pack_tq1(codes: Tensor, scales: Tensor) -> Tensor:
    """Return GGUF's TQ1_0 [out, 54 in / 256] uint8; scales as for `pack_tq2`."""
    rows, blocks = _check_blocks(codes)
    trits = (codes + 1).int().view(rows, blocks, BLOCK)
    powers = torch.tensor(TRITS, dtype=torch.int32, device=codes.device)[:, None]
    first = (trits[..., :160].view(rows, blocks, 5, 32) * powers).sum(2)
    second = (trits[..., 160:240].view(rows, blocks, 5, 16) * powers).sum(2)
    last = (trits[..., 240:].view(rows, blocks, 4, 4) * powers[:4]).sum(2)
    numbers = torch.cat([first, second, last], -1)
    return _with_scales(((numbers * 256 + 242) // 243).to(torch.uint8), scales)


def unpack_tq1(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [out, in] and the scales [out, in / 256] float32 of `pack_tq1`."""
    bytes_, scales = _without_scales(packed, 54)
    rows, blocks = scales.shape
    parts = []
    for part, count in zip(bytes_.int().view(rows, blocks, 52).split([32, 16, 4], -1), (5, 5, 4), strict=True):
        powers = torch.tensor([3**trit for trit in range(count)], device=packed.device)[:, None]
        parts.append(((part[:, :, None] * powers % 256) * 3 >> 8).view(rows, blocks, -1))
    return torch.cat(parts, -1).to(torch.int8).view(rows, -1) - 1, scales


def _merge(parts: Tensor) -> Tensor:
    """Return bytes of four two-bit values [..., 4, n] each, the first value in the lowest bits."""
    first, second, third, fourth = parts.unbind(-2)
    return first | second << 2 | third << 4 | fourth << 6


def _blocks(codes: Tensor, size: int) -> Tensor:
    """Return codes plus one, in whole blocks."""
    return F.pad((codes + 1).to(torch.uint8), (0, -codes.shape[1] % size), value=1)


def _check_blocks(codes: Tensor) -> tuple[int, int]:
    if codes.shape[1] % BLOCK:
        raise ValueError(f"GGUF's ternary types: {codes.shape[1]} inputs do not fill blocks of {BLOCK}")
    return codes.shape[0], codes.shape[1] // BLOCK


def _with_scales(bytes_: Tensor, scales: Tensor) -> Tensor:
    """Return the bytes of each block [out, blocks, n] followed by its scale."""
    halves = scales.to(torch.float16).expand(bytes_.shape[:2]).contiguous()
    return torch.cat([bytes_, halves.view(torch.uint8).view(*bytes_.shape[:2], 2)], -1).flatten(1)


def _without_scales(packed: Tensor, size: int) -> tuple[Tensor, Tensor]:
    if packed.shape[1] % size:
        raise ValueError(f"GGUF's ternary types: {packed.shape[1]} bytes of a row do not fill blocks of {size}")
    blocks = packed.view(packed.shape[0], -1, size)
    scales = blocks[..., -2:].contiguous().view(torch.float16)[..., 0].float()
    return blocks[..., :-2].contiguous(), scales
