"""The layer that replaces a linear layer, in the form `core`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from luthier import wide_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from luthier_osft.complement import Complement, complement_shapes
from luthier_osft.product import changed_product, composed_product, computes_product, product_dtype, token_factor

COMPOSED = (
    2.0  # token factor from which adding up pays: equal on a Zen 4 core at 500 tokens by 512 x 512, or 1280 x 512
)


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

    The parameters of a sharded model keep their shapes. So `expect_task` makes those of a later task, and bases of the
    task before it that have other shapes are held whole in `earlier` until the task begins.
    """

    out_side: Complement
    in_side: Complement

    def __init__(self, base_layer: nn.Module, rank: int, switch: Switch, device: torch.device) -> None:
        super().__init__()
        self.base_layer, self.switch, self.rank = base_layer, switch, rank
        self.in_features, self.out_features = count_features(base_layer) or (0, 0)
        self.dtype = self.computed = torch.float64 if _is_double(base_layer) else torch.float32
        self.before: nn.Parameter | None
        self.register_parameter("before", None)
        self.earlier: dict[str, Tensor] | None = None
        self._made: dict[str, Any] = {"dtype": self.dtype, "device": device}
        self._make_sides(rank)
        self._make_trained(self._made)
        self.train(base_layer.training)

    def _make_trained(self, made: Mapping[str, Any]) -> None:
        shape = self.out_features - self.rank, self.in_features - self.rank
        self.core = nn.Parameter(torch.zeros(shape, **made))

    def _make_sides(self, rank: int) -> None:
        self.rank = rank
        for side, size in (("out", self.out_features), ("in", self.in_features)):
            setattr(self, f"{side}_side", Complement(size, _zeros(complement_shapes(size, rank), self._made)))

    def expect_task(self, rank: int, weight: Tensor | None) -> None:
        """Make room for a later task that preserves `rank` directions of a weight [out, in] of its own.

        Until the task begins it is `weight`, or arbitrary if that is None.
        """
        self._make_sides(rank)
        self._replace_weight(
            torch.empty(self.out_features, self.in_features, **self._made) if weight is None else weight
        )

    def _replace_weight(self, weight: Tensor) -> None:
        """Set `before`, in place if it is there."""
        if self.before is None:
            self.before = nn.Parameter(weight.to(self._place, self.dtype, copy=True), requires_grad=False)
        else:
            write_whole(self.before.detach(), weight)

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
        self.computed = product_dtype(x)
        if not args and not kwargs and self._is_product(x):
            return self._product(x.to(self.computed))
        if self.before is None:
            result = self.base_layer(x, *args, **kwargs)
        else:
            result = functional.linear(x, self.before.to(x.dtype), self.bias)
        dtype = x.dtype if x.dtype is torch.bfloat16 else torch.promote_types(x.dtype, self.dtype)
        return result + self.change(x.to(dtype)).to(result.dtype)

    def _is_product(self, x: Tensor) -> bool:
        """Return True if `changed_product` can compute the forward pass: of a plain layer, its bases being dense.

        The basis of the longer side is applied to C, and may be stored as reflectors.
        """
        outer = self.out_features > self.in_features or hasattr(self.out_side, "basis")
        inner = self.out_features < self.in_features or hasattr(self.in_side, "basis")
        return self._is_exact(product_dtype(x)) and outer and inner and computes_product(self.base_layer, x)

    def _is_exact(self, dtype: torch.dtype) -> bool:
        """Return True if a product of this dtype needs no other for its change."""
        return dtype is torch.bfloat16 or torch.promote_types(dtype, self.dtype) == dtype

    def _product(self, x: Tensor) -> Tensor:
        """Return the output with the base and the change as one operation.

        Products in 16 bits round a wider weight. If there are many tokens, the change is added to it before that. In a
        weight that has 16 bits itself, a small change would be rounded away.
        """
        base: Any = self.base_layer
        weight = base.weight if self.before is None else self.before
        pays = x.element_size() == 2 and token_factor(x, self.out_features, self.in_features) > COMPOSED
        wide = wide_weight(weight) if pays else None
        with torch.autocast(x.device.type, enabled=False):
            if wide is None:
                return changed_product(x, weight, base.bias, *self._narrow_factors(x.dtype))
            return composed_product(x, wide, base.bias, *self._factors(x.dtype))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return V [in, v] and U [out, v], whose product U V^T is the change.

        The basis of the longer side is applied to C, which has fewer rows than x.
        """
        core = self._used_core().to(dtype)
        if self.out_features < self.in_features:
            return self.in_side.expand(core).T, self.out_side.basis
        return self.in_side.basis, self.out_side.expand(core.T).T

    def _narrow_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return V, C and U, whose product U C V^T is the change, C being None if it is part of the others."""
        if self.out_features == self.in_features:
            return self.in_side.basis, self._used_core(), self.out_side.basis
        inner, outer = self._factors(dtype)
        return inner, None, outer

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
        """Return Q_U C Q_V^T, [out, in] in the dtype of C, whole on every rank."""
        outer, inner = self.whole_sides()
        rows, columns = self.out_features - outer.num_directions, self.in_features - inner.num_directions
        return outer.expand(inner.expand(read_whole(self.core)[:rows, :columns]).T).T

    def whole_sides(self) -> tuple[Complement, Complement]:
        """Return both complements with whole tensors, for use outside the passes of a sharded model."""
        stored = {**self._stored("out"), **self._stored("in")} if self.earlier is None else self.earlier
        if self.earlier is None and not any(is_shard(tensor) for tensor in stored.values()):
            return self.out_side, self.in_side
        whole = {name: read_whole(tensor) for name, tensor in stored.items()}
        return (
            Complement(self.out_features, take_prefixed(whole, "out.")),
            Complement(self.in_features, take_prefixed(whole, "in.")),
        )

    @torch.no_grad()
    def begin(self, bases: Mapping[str, Tensor], rank: int) -> None:
        """Set the bases that `decompose` returned for `rank` preserved directions, and begin without a change."""
        self._set_sides(bases, rank)
        self.core.zero_()

    @torch.no_grad()
    def begin_again(self, weight: Tensor, bases: Mapping[str, Tensor], rank: int) -> None:
        """Begin a later task from the weight [out, in] that the tasks before it have left."""
        self._replace_weight(weight)
        self.begin(bases, rank)

    def _set_sides(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        """Fill both complements in place, or replace them if their shapes are others."""
        for side, size in (("out", self.out_features), ("in", self.in_features)):
            own, given = self._stored(side), {n: t for n, t in tensors.items() if n.startswith(f"{side}.")}
            if _shapes(own) == _shapes(given):
                for name, tensor in own.items():
                    write_whole(tensor, given[name])
            else:
                placed = {n: t.to(self._place, self.dtype) for n, t in take_prefixed(given, f"{side}.").items()}
                setattr(self, f"{side}_side", Complement(size, placed))
        self.rank, self.earlier = rank, None

    @property
    def _place(self) -> torch.device:
        return next(iter(self.trained().values())).device

    def _stored(self, side: str) -> dict[str, Tensor]:
        return {f"{side}.{name}": tensor for name, tensor in getattr(self, f"{side}_side").tensors().items()}

    def frozen(self) -> dict[str, Tensor]:
        """Return the frozen tensors that a resumed run needs, by name."""
        sides = {**self._stored("out"), **self._stored("in")}
        return sides if self.before is None else {**sides, "before": self.before.detach()}

    @torch.no_grad()
    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `frozen` returned, or, before a later task begins, what it returned in the task before."""
        own = {**self._stored("out"), **self._stored("in")}
        given = {name: tensor for name, tensor in tensors.items() if name.startswith(("out.", "in."))}
        if _shapes(own) != _shapes(given) and any(is_shard(tensor) for tensor in own.values()):
            self.earlier = {name: read_whole(tensor) for name, tensor in given.items()}
        else:
            self._set_sides(given, _rank_of(given, self.out_features))
        if "before" in tensors:
            self._replace_weight(tensors["before"])
        elif self.before is not None and not is_shard(self.before):
            self.before = None


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


def take_prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names have the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _rank_of(tensors: Mapping[str, Tensor], size: int) -> int:
    """Return the number of directions that the complement of the outputs, `size` of them, leaves out."""
    if "out.basis" in tensors:
        return size - tensors["out.basis"].shape[1]
    return tensors["out.factor"].shape[0] if tensors else 0


def _is_double(layer: nn.Module) -> bool:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return any(tensor.dtype is torch.float64 for tensor in tensors)
