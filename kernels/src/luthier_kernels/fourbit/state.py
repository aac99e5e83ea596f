"""FourBitWeight: a 4-bit weight with its scales and format. In a state dict it has the form of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier_kernels.fourbit.codebooks import check_format, code_values, dynamic_map
from luthier_kernels.fourbit.dequantize import dequantize_fourbit
from luthier_kernels.fourbit.linear import Given
from luthier_kernels.fourbit.nesting import NESTED_BLOCK, nest_scales
from luthier_kernels.fourbit.quantize import quantize_fourbit

MARK = "quant_state.bitsandbytes__"


@dataclass(frozen=True, kw_only=True)
class FourBitWeight:
    """A weight of `shape` as packed codes [ceil(n / 2)] uint8 and the scales of its blocks.

    `scales` are float32, or uint8 codes where `nested` (float32) and `offset` ([] float32) are given; `dtype` is
    that of the weight it was made of.
    """

    packed: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "nf4"
    block_size: int = 64
    nested: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def from_weight(
        cls, weight: Tensor, kind: str = "nf4", block_size: int = 64, double_quantization: bool = True
    ) -> FourBitWeight:
        """Quantize a weight; `double_quantization` nests its scales."""
        packed, scales = quantize_fourbit(weight, kind, block_size)
        nested = offset = None
        if double_quantization:
            scales, nested, offset = nest_scales(scales)
        return cls(packed=packed, scales=scales, shape=tuple(weight.shape), dtype=weight.dtype, kind=kind,
                   block_size=block_size, nested=nested, offset=offset)  # fmt: skip

    def arguments(self) -> Given:
        """Return what `multiply_fourbit` takes."""
        return self.packed, self.scales, self.nested, self.offset, list(self.shape), self.kind, self.block_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight of its shape."""
        nesting = None if self.nested is None or self.offset is None else (self.nested, self.offset)
        return dequantize_fourbit(self.packed, self.scales, self.shape, dtype, self.kind, self.block_size, nesting)

    def count_bytes(self) -> int:
        """Return the size of its tensors in bytes."""
        tensors = (self.packed, self.scales, self.nested, self.offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return its tensors as bitsandbytes names them, by suffix of the weight's name ("": the packed weight)."""
        about: dict[str, Any] = {"quant_type": self.kind, "blocksize": self.block_size}
        about |= {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        device = self.packed.device
        tensors = {
            "": self.packed.view(-1, 1),
            "absmax": self.scales,
            "quant_map": code_values(self.kind, device).clone(),
        }
        if self.nested is not None and self.offset is not None:
            tensors |= {"nested_absmax": self.nested, "nested_quant_map": dynamic_map(device).clone()}
            about |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        tensors[MARK + self.kind] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device=device)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FourBitWeight:
        """Read what `to_tensors` or bitsandbytes wrote. Raises ValueError if it is incomplete or unknown."""
        about = _read_about(tensors)
        check_format(about["quant_type"], about["blocksize"])
        device = tensors[""].device
        nested = tensors.get("nested_absmax")
        maps = {"quant_map": code_values(about["quant_type"], device), "nested_quant_map": dynamic_map(device)}
        for name, expected in maps.items():
            if name in tensors and not torch.equal(tensors[name].float(), expected):
                raise ValueError(f"4-bit weight: {name} is not the one of {about['quant_type']}")
        if nested is not None and about["nested_blocksize"] != NESTED_BLOCK:
            raise ValueError(f"4-bit weight: nested blocks of {about['nested_blocksize']}, expected {NESTED_BLOCK}")
        offset = None if nested is None else torch.tensor(float(about["nested_offset"]), device=device)
        made = cls(
            packed=tensors[""].reshape(-1).view(torch.uint8), scales=tensors["absmax"], shape=tuple(about["shape"]),
            dtype=getattr(torch, about["dtype"]), kind=about["quant_type"], block_size=about["blocksize"],
            nested=nested, offset=offset,
        )  # fmt: skip
        made.check_sizes()
        return made

    def check_sizes(self) -> None:
        """Raise ValueError if a tensor has another length than the shape requires, as in a truncated file."""
        total = torch.Size(self.shape).numel()
        blocks = -(-total // self.block_size)
        sizes = [("packed", self.packed, -(-total // 2)), ("absmax", self.scales, blocks)]
        if self.nested is not None:
            sizes.append(("nested_absmax", self.nested, -(-blocks // NESTED_BLOCK)))
        for name, tensor, expected in sizes:
            if tensor.numel() != expected:
                raise ValueError(f"4-bit weight: {name} has {tensor.numel()} elements, expected {expected}")


def _read_about(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the JSON that the tensor `quant_state.bitsandbytes__KIND` holds."""
    marked = [name for name in tensors if name.startswith(MARK)]
    missing = {"", "absmax"} - tensors.keys()
    if len(marked) != 1 or missing:
        raise ValueError(f"4-bit weight: incomplete, only {sorted(tensors)} exist")
    try:
        return json.loads(bytes(tensors[marked[0]].tolist()).decode())
    except ValueError as error:
        raise ValueError(f"4-bit weight: {marked[0]} is not JSON: {error}") from None
