"""The layer that replaces a linear layer, and the choice of layers."""

from __future__ import annotations

from typing import Any, Final

import torch
from luthier import LuthierError
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

DEFAULTS: Final = ("q_proj", "v_proj")
ALL_LINEAR: Final = "all-linear"


class Factor(nn.Module):
    """A matrix under PEFT's name."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class SlaoLayer(nn.Module):
    """y = base(x) + scale B A x, with A [r, in], B [out, r]; `other_A` and `other_B` are a pair that is not in use.

    While a task trains, they are the merged pair of the tasks before; between tasks `other_B` is the last trained B.
    """

    def __init__(self, base_layer: nn.Module, rank: int, scale: float, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.base_layer, self.scale, self.enabled = base_layer, scale, True
        self.in_features, self.out_features = count_features(base_layer) or (0, 0)
        dtype = torch.float64 if _is_double(base_layer) else torch.float32
        self.lora_A = Factor(torch.zeros(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = Factor(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        # parameters, so that they are sharded as A and B are
        self.other_A = nn.Parameter(torch.zeros_like(self.lora_A.weight), requires_grad=False)
        self.other_B = nn.Parameter(torch.zeros_like(self.lora_B.weight), requires_grad=False)
        self.lora_dropout = nn.Dropout(dropout)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """Return the base layer's weight, because some models read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x [..., in]
        result = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return result
        a, b = self.lora_A.weight, self.lora_B.weight
        dtype = x.dtype if x.dtype is torch.bfloat16 else torch.promote_types(x.dtype, a.dtype)
        inner = functional.linear(self.lora_dropout(x.to(dtype)), a.to(dtype))  # [..., r]
        return result + (functional.linear(inner, b.to(dtype)) * self.scale).to(result.dtype)

    def update_weight(self) -> Tensor:
        """Return scale B A, [out, in]."""
        return self.scale * self.lora_B.weight.detach() @ self.lora_A.weight.detach()


def count_features(layer: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a layer that multiplies by a matrix, or None for any other module."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


def find_layers(model: Any, wanted: str | list[str] | None) -> list[str]:
    """Return the names of the layers to wrap. Raises `model-target` if a wanted end of a name matches none.

    The head is never wrapped, and `all-linear` does not include routers.
    """
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if count_features(module)}
    every = [name for name, module in layers.items() if module is not head]
    if wanted == ALL_LINEAR:
        return [name for name in every if not name.endswith((".gate", ".router"))]
    ends = [wanted] if isinstance(wanted, str) else list(DEFAULTS if wanted is None else wanted)
    known = sorted({name.rpartition(".")[2] for name in every})
    remedy = f"Choose of: {', '.join(known)}, or {ALL_LINEAR}."
    if not ends:
        problem = "the adapter targets no layer"
        raise LuthierError("train-nothing", problem, where="target_modules", found=wanted, remedy=remedy)
    for end in ends:
        if not any(_ends_with(name, end) for name in every):
            is_head = any(_ends_with(name, end) for name in layers)
            problem = "it matches only the head, which SLAO never adapts" if is_head else "it matches no layer"
            raise LuthierError("model-target", problem, where="target_modules", found=end, remedy=remedy)
    return [name for name in every if any(_ends_with(name, end) for end in ends)]


def check_rank(model: Any, names: list[str], rank: int) -> None:
    """Raise `recipe-out-of-range` if a layer has too few inputs for so many orthonormal rows of A."""
    sizes = {name: (count_features(model.get_submodule(name)) or (0, 0))[0] for name in names}
    narrowest = min(sizes, key=sizes.__getitem__)
    if rank > sizes[narrowest]:
        problem = f"{narrowest} has {sizes[narrowest]} inputs, and its A cannot have {rank} orthonormal rows"
        remedy = f"At most {sizes[narrowest]} is possible."
        raise LuthierError("recipe-out-of-range", problem, where="r", found=rank, remedy=remedy)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def read_whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered from all ranks if it is sharded."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def write_whole(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into `place`, of which this rank may hold a shard."""
    if not hasattr(place, "full_tensor"):
        place.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    place.copy_(distribute_tensor(tensor.to(place.dtype), place.device_mesh, place.placements))  # type: ignore[attr-defined]


def _is_double(layer: nn.Module) -> bool:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return any(tensor.dtype is torch.float64 for tensor in tensors)
