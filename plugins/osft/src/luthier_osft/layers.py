"""The layer that replaces a linear layer, in the form `core`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier_osft.complement import Complement, complement_shapes


@attrs.define
class Switch:
    """The switch that layers share: on, they add their change."""

    enabled: bool = True


class OsftLayer(nn.Module):
    """y = base(x) + Q_U C Q_V^T x, with C [out - k, in - k] trained and both bases frozen.

    The bases span the complement of the weight's first k left and right singular vectors, so that the weight keeps
    those k triplets whatever C becomes. `before` [out, in] is the weight as earlier tasks left it, which replaces the
    base layer's; None in the first task. If a task preserves more than the one for which C was made, only the first
    rows and columns of C are used.
    """

    def __init__(self, base_layer: nn.Module, rank: int, switch: Switch, device: torch.device) -> None:
        super().__init__()
        self.base_layer, self.switch, self.rank = base_layer, switch, rank
        self.in_features, self.out_features = count_features(base_layer) or (0, 0)
        self.dtype = torch.float64 if _is_double(base_layer) else torch.float32
        self.before: Tensor | None
        self.register_buffer("before", None, persistent=False)
        made = {"dtype": self.dtype, "device": device}
        self.out_side = Complement(self.out_features, _zeros(complement_shapes(self.out_features, rank), made))
        self.in_side = Complement(self.in_features, _zeros(complement_shapes(self.in_features, rank), made))
        self._make_trained(made)
        self.train(base_layer.training)

    def _make_trained(self, made: Mapping[str, Any]) -> None:
        shape = self.out_features - self.rank, self.in_features - self.rank
        self.core = nn.Parameter(torch.zeros(shape, **made))

    @property
    def weight(self) -> Tensor:
        """Return the base layer's weight, because some models read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by their names in this module."""
        return {"core": self.core}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x [..., in]
        if not self.switch.enabled:
            return self.base_layer(x, *args, **kwargs)
        if self.before is None:
            result = self.base_layer(x, *args, **kwargs)
        else:
            result = functional.linear(x, self.before.to(x.dtype), self.bias)
        dtype = x.dtype if x.dtype is torch.bfloat16 else torch.promote_types(x.dtype, self.dtype)
        return result + self.change(x.to(dtype)).to(result.dtype)

    def change(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        """Return Q_U C Q_V^T x. The basis of the longer side is applied to C, which has fewer rows than x."""
        core = self._used_core().to(x.dtype)
        if self.out_features > self.in_features:
            outer = self.out_side.expand(core.T)  # [in - k, out]
            return functional.linear(self.in_side.project(x), outer.T)
        if self.out_features < self.in_features:
            inner = self.in_side.expand(core)  # [out - k, in]
            return self.out_side.expand(functional.linear(x, inner))
        return self.out_side.expand(functional.linear(self.in_side.project(x), core))

    def _used_core(self) -> Tensor:
        rows, columns = self.out_features - self.rank, self.in_features - self.rank
        return self.core if self.core.shape == (rows, columns) else self.core[:rows, :columns]

    @torch.no_grad()
    def change_weight(self) -> Tensor:
        """Return Q_U C Q_V^T, [out, in] in the dtype of C."""
        return self.out_side.expand(self.in_side.expand(self._used_core()).T).T

    @torch.no_grad()
    def begin(self, bases: Mapping[str, Tensor], rank: int) -> None:
        """Set the bases that `decompose` returned for `rank` preserved directions, and begin without a change."""
        self._take_sides(bases, rank)
        self.core.zero_()

    def _take_sides(self, bases: Mapping[str, Tensor], rank: int) -> None:
        self.rank = rank
        sides = {side: _under(bases, side) for side in ("out", "in")}
        self.out_side = Complement(self.out_features, sides["out"])
        self.in_side = Complement(self.in_features, sides["in"])

    @property
    def _place(self) -> torch.device:
        return next(iter(self.trained().values())).device

    def frozen(self) -> dict[str, Tensor]:
        """Return the frozen tensors that a resumed run needs, by name."""
        tensors = {f"out.{name}": tensor for name, tensor in self.out_side.tensors().items()}
        tensors |= {f"in.{name}": tensor for name, tensor in self.in_side.tensors().items()}
        return tensors if self.before is None else {**tensors, "before": self.before}

    @torch.no_grad()
    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `frozen` returned. Tensors of the same shape are filled in place, as shards must be."""
        for side, complement in (("out", self.out_side), ("in", self.in_side)):
            given, own_tensors = _under(tensors, side), complement.tensors()
            if {n: t.shape for n, t in own_tensors.items()} == {n: t.shape for n, t in given.items()}:
                for name, tensor in own_tensors.items():
                    write_whole(tensor, given[name])
            else:
                placed = {n: t.to(self._place, self.dtype) for n, t in given.items()}
                setattr(self, f"{side}_side", Complement(complement.size, placed))
                self.rank = _rank_of(placed, complement.size)
        self.before = tensors["before"].to(self._place, self.dtype) if "before" in tensors else None


def count_features(layer: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a layer that multiplies by a matrix, or None for any other module."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (sizes[0], sizes[1]) if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


def is_dense(layer: nn.Module) -> bool:
    """Return True if the layer's weight holds numbers, not codes."""
    return type(layer) in (nn.Linear, Conv1D) and layer.weight.element_size() > 1  # type: ignore[operator]


def read_whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered from all ranks if it is sharded."""
    full = tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return full.detach().clone()


def write_whole(place: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, or this rank's shard of it, into `place`, which may be a shard."""
    if not is_shard(place) or is_shard(tensor):
        place.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    local = tensor.to(place.device, place.dtype)
    place.copy_(distribute_tensor(local, place.device_mesh, place.placements))  # type: ignore[attr-defined]


def is_shard(tensor: Tensor) -> bool:
    """Return True if each rank holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def _zeros(shapes: Mapping[str, tuple[int, ...]], made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, **made) for name, shape in shapes.items()}


def _under(tensors: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    return {n.partition(".")[2]: tensor for n, tensor in tensors.items() if n.startswith(f"{side}.")}


def _rank_of(tensors: Mapping[str, Tensor], size: int) -> int:
    if "basis" in tensors:
        return size - tensors["basis"].shape[1]
    return tensors["factor"].shape[0] if tensors else 0


def _is_double(layer: nn.Module) -> bool:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return any(tensor.dtype is torch.float64 for tensor in tensors)
