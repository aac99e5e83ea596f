"""The form `factored`: the smallest singular triplets of a weight train, and are projected after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier_osft.layers import OsftLayer, is_shard, read_whole, write_whole

TRIPLETS = ("left", "values", "right")


class FactoredLayer(OsftLayer):
    """y = base(x) + (U S V - U_0 S_0 V_0) x, with U [out, r], S [r] and V [r, in] trained.

    They begin as the smallest singular triplets U_0 S_0 V_0 of the weight. So the layer equals mini_trainer's
    U_h S_h V_h + U S V, and is exactly the base at the start. Most optimizers move U and V out of the complements;
    `project` moves them back. Outside of training, and in a merged weight, the change itself is projected: an optimizer
    that averages weights then shows factors that include steps from before their projection.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    first_left: Tensor
    first_values: Tensor
    first_right: Tensor

    def _make_trained(self, made: Mapping[str, Any]) -> None:
        count = min(self.out_features, self.in_features) - self.rank
        shapes = (self.out_features, count), (count,), (count, self.in_features)
        for name, shape in zip(TRIPLETS, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.zeros(shape, **made)))
            setattr(self, f"first_{name}", nn.Parameter(torch.zeros(shape, **made), requires_grad=False))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in TRIPLETS}

    def _is_product(self, x: Tensor) -> bool:
        """Return False: the change is the difference of two products."""
        return False

    def change(self, x: Tensor) -> Tensor:
        if not self.training:
            x = self.in_side.expand(self.in_side.project(x))
        now = _apply(x, self.left, self.values, self.right)
        change = now - _apply(x, self.first_left, self.first_values, self.first_right)
        return change if self.training else self.out_side.expand(self.out_side.project(change))

    @torch.no_grad()
    def change_weight(self) -> Tensor:
        left, values, right = (read_whole(getattr(self, name)) for name in TRIPLETS)
        first_left, first_values, first_right = (read_whole(getattr(self, f"first_{name}")) for name in TRIPLETS)
        self.project(left, right)
        return (left * values) @ right - (first_left * first_values) @ first_right

    @torch.no_grad()
    def begin(self, bases: Mapping[str, Tensor], rank: int) -> None:
        self._set_sides(bases, rank)
        for name, key in zip(TRIPLETS, ("tail.out", "tail.values", "tail.in"), strict=True):
            for prefix in ("", "first_"):
                write_whole(getattr(self, f"{prefix}{name}"), bases[key])

    def frozen(self) -> dict[str, Tensor]:
        return {**super().frozen(), **{f"first_{name}": getattr(self, f"first_{name}").detach() for name in TRIPLETS}}

    @torch.no_grad()
    def load_frozen(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_frozen(tensors)
        for name in TRIPLETS:
            write_whole(getattr(self, f"first_{name}"), tensors[f"first_{name}"])

    @torch.no_grad()
    def project(self, left: Tensor, right: Tensor) -> None:
        """Remove from [out, r] and [r, in], or their shards, the parts in preserved directions."""
        outer, inner = self.whole_sides()
        columns, rows = (read_whole(t) if is_shard(t) else t for t in (left, right))
        write_whole(left, outer.expand(outer.project(columns.T)).T.contiguous())
        write_whole(right, inner.expand(inner.project(rows)))


def _apply(x: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    inner = functional.linear(x, right.to(x.dtype)) * values.to(x.dtype)  # [..., r]
    return functional.linear(inner, left.to(inner.dtype))
