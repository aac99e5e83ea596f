"""Operations on one tile of a head's products [C, n] (float32, bfloat16, float16 or float64), in place.

A tile is n columns of the vocabulary for C tokens. `Bend` says how products become logits z: (product + bias [n]) *
scale, and with a soft cap then cap * tanh(z / cap). Statistics are float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import jit, runs_triton, tl
from luthier_kernels.native import has_native, native_function, run_parts

WIDEST = 8192  # columns of the widest tile: the row buffer in C holds so many
NATIVE = (torch.float32, torch.bfloat16)
PART = 1024  # columns that a Triton program computes at a time


class Bend(NamedTuple):
    """The bias, scale and soft cap that turn products into logits. A cap of 0 means none."""

    bias: Tensor | None
    scale: float
    cap: float


def fold_tile(
    products: Tensor, bend: Bend, labels: Tensor, first: int, label_logits: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and the sum of exponentials below it, [C] each.

    The largest is finite even if a bias masks all logits with -inf, because peaks of tiles are subtracted later. The
    logit of each label in this tile, whose first column is `first`, is written to `label_logits` [C]. With `keep` the
    products are replaced by exp(logit - peak), times the derivative of the soft cap, and by 0 at labels.
    """
    given = (products, bend, labels, first, label_logits, keep)
    return run_first(
        "fold_tile",
        ("triton", _fits_triton(products), lambda: _fold_triton(*given)),
        ("native", _is_native(products), lambda: _fold_native(*given)),
        ("torch", True, lambda: _fold_torch(*given)),
    )


def slope_tile(products: Tensor, bend: Bend, labels: Tensor, first: int, norms: Tensor, factors: Tensor) -> None:
    """Replace products by the gradients of factors [C] * log-probabilities. `norms` [C] are log-sum-exps."""
    given = (products, bend, labels, first, norms, factors)
    run_first(
        "slope_tile",
        ("triton", _fits_triton(products), lambda: _slope_triton(*given)),
        ("native", _is_native(products), lambda: _slope_native(*given)),
        ("torch", True, lambda: _slope_torch(*given)),
    )


def add_rows(total: Tensor, made: Tensor, factor: Tensor, shares: Tensor) -> None:
    """Compute total [C, H] = total * factor [C] + made * shares [C], in place."""
    native = _is_native(made) and made.shape[1] > 0

    def add_native() -> None:
        call, wide = native_function("head", "add_rows"), made.dtype is torch.float32
        run_parts(len(made), 16, lambda start, end: call(total, made, wide, factor, shares, start, end, made.shape[1]))

    run_first(
        "add_rows",
        ("native", native, add_native),
        ("torch", True, lambda: total.mul_(factor[:, None]).addcmul_(made.to(total.dtype), shares[:, None])),
    )


def bend_products(products: Tensor, bend: Bend) -> tuple[Tensor, Tensor | None]:
    """Return logits, and the derivative of their soft cap, in plain torch."""
    z = products.to(torch.promote_types(products.dtype, torch.float32))
    z = z if bend.bias is None else z + bend.bias.to(z.dtype)
    z = z * bend.scale
    if not bend.cap:
        return z, None
    bent = torch.tanh(z / bend.cap)
    return bend.cap * bent, 1 - bent.square()


def _fold_torch(
    products: Tensor, bend: Bend, labels: Tensor, first: int, label_logits: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    z, slopes = bend_products(products, bend)
    rows, places = _places(labels, first, products.shape[1])
    label_logits[rows] = z[rows, places]
    peaks = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
    own = (z - peaks[:, None]).exp_()
    masses = own.sum(1)
    if keep:
        own[rows, places] = 0.0
        products.copy_(own if slopes is None else own.mul_(slopes))
    return peaks, masses


def _slope_torch(products: Tensor, bend: Bend, labels: Tensor, first: int, norms: Tensor, factors: Tensor) -> None:
    z, slopes = bend_products(products, bend)
    rows, places = _places(labels, first, products.shape[1])
    own = (z - norms[:, None]).exp_().mul_(-factors[:, None])
    own[rows, places] += factors[rows]
    products.copy_((own if slopes is None else own.mul_(slopes)).mul_(bend.scale))


def _places(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    rows = ((labels >= first) & (labels < first + columns)).nonzero().squeeze(1)
    return rows, labels[rows] - first


def _fold_native(
    products: Tensor, bend: Bend, labels: Tensor, first: int, label_logits: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    peaks, masses = torch.empty(len(products)), torch.empty(len(products))
    call, shared = native_function("head", "fold_tile"), _shared(products, bend, labels, first)

    def fold_part(start: int, end: int) -> None:
        call(*shared, keep, start, end, products.shape[1], peaks, masses, label_logits)

    run_parts(len(products), 16, fold_part)
    return peaks, masses


def _slope_native(products: Tensor, bend: Bend, labels: Tensor, first: int, norms: Tensor, factors: Tensor) -> None:
    call, shared = native_function("head", "slope_tile"), _shared(products, bend, labels, first)
    run_parts(len(products), 16, lambda start, end: call(*shared, norms, factors, start, end, products.shape[1]))


def _shared(products: Tensor, bend: Bend, labels: Tensor, first: int) -> tuple[Any, ...]:
    bias = None if bend.bias is None else bend.bias.float().contiguous()
    return products, products.dtype is torch.float32, bias, labels, first, bend.scale, bend.cap


def _is_native(products: Tensor) -> bool:
    known = products.dtype in NATIVE and products.device.type == "cpu" and products.is_contiguous()
    return known and products.numel() > 0 and has_native("head")


def _fits_triton(products: Tensor) -> bool:
    known = products.numel() > 0 and products.dtype is not torch.float64 and products.is_contiguous()
    return known and runs_triton(products)


@jit
def load_logits(
    products: Any, bias: Any, place: Any, base: Any, inside: Any, scale: Any, cap: Any, has_bias: tl.constexpr,
    has_cap: tl.constexpr,
) -> Any:  # fmt: skip
    """Return, inside a kernel, logits of some columns of a row (-inf outside) and the soft cap's derivative."""
    z = tl.load(products + base + place, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        z += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    z = z * scale
    slope = tl.zeros_like(z) + 1.0  # not z * 0, which is NaN for an infinite z
    if has_cap:
        bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / cap))
        slope = 1.0 - bent * bent
        z = cap * bent
    return tl.where(inside, z, float("-inf")), slope


@jit
def fold_kernel(
    products: Any, bias: Any, labels: Any, label_logits: Any, peaks: Any, masses: Any, first: Any, scale: Any, cap: Any,
    columns: Any, keep: tl.constexpr, has_bias: tl.constexpr, has_cap: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes one row: peak and sum in one pass, exponentials in a second."""
    row = tl.program_id(0).to(tl.int64)
    base, own = row * columns, tl.load(labels + row) - first
    lanes = tl.arange(0, size)
    peak = tl.full((), -3.4028234663852886e38, tl.float32)  # the least finite one
    mass = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, size):
        place = start + lanes
        z, _ = load_logits(products, bias, place, base, place < columns, scale, cap, has_bias, has_cap)
        higher = tl.maximum(peak, tl.max(z, 0))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
        peak = higher
        tl.store(label_logits + row + lanes * 0, z, mask=(place == own) & (place < columns))
    tl.store(peaks + row, peak)
    tl.store(masses + row, mass)
    if keep:
        for start in range(0, columns, size):
            place = start + lanes
            inside = place < columns
            z, slope = load_logits(products, bias, place, base, inside, scale, cap, has_bias, has_cap)
            made = tl.where(place == own, 0.0, tl.exp(z - peak) * slope)
            tl.store(products + base + place, made.to(products.dtype.element_ty), mask=inside)


@jit
def slope_kernel(
    products: Any, bias: Any, labels: Any, norms: Any, factors: Any, first: Any, scale: Any, cap: Any, columns: Any,
    has_bias: tl.constexpr, has_cap: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * size + tl.arange(0, size)
    inside, own = place < columns, tl.load(labels + row) - first
    norm, factor = tl.load(norms + row), tl.load(factors + row)
    z, slope = load_logits(products, bias, place, row * columns, inside, scale, cap, has_bias, has_cap)
    made = (tl.where(place == own, factor, 0.0) - factor * tl.exp(z - norm)) * slope * scale
    tl.store(products + row * columns + place, made.to(products.dtype.element_ty), mask=inside)


def _fold_triton(
    products: Tensor, bend: Bend, labels: Tensor, first: int, label_logits: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    peaks, masses = torch.empty_like(label_logits), torch.empty_like(label_logits)
    bias = products if bend.bias is None else bend.bias.contiguous()
    given = (products, bias, labels, label_logits, peaks, masses, first, bend.scale, bend.cap or 1.0, products.shape[1])
    has_bias, has_cap = bend.bias is not None, bend.cap > 0
    fold_kernel[(len(products),)](*given, keep=keep, has_bias=has_bias, has_cap=has_cap, size=PART)
    return peaks, masses


def _slope_triton(products: Tensor, bend: Bend, labels: Tensor, first: int, norms: Tensor, factors: Tensor) -> None:
    bias, columns = products if bend.bias is None else bend.bias.contiguous(), products.shape[1]
    given = (products, bias, labels, norms, factors, first, bend.scale, bend.cap or 1.0, columns)
    has_bias, has_cap = bend.bias is not None, bend.cap > 0
    grid = (len(products), -(-columns // PART))
    slope_kernel[grid](*given, has_bias=has_bias, has_cap=has_cap, size=PART)
