"""The form `factored`: the smallest singular triplets of a weight train, and are projected after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier_osft.complement import Complement
from luthier_osft.layers import OsftLayer, is_shard, read_whole, write_whole
from luthier_osft.product import computes_product, product_dtype, token_factor

TRIPLETS = ("left", "values", "right")


class FactoredLayer(OsftLayer):
    """y = base(x) + (U S V - U_0 S_0 V_0) x, with U [out, r], S [r] and V [r, in] trained.

    They begin as the smallest singular triplets U_0 S_0 V_0 of the weight. So the layer equals mini_trainer's
    U_h S_h V_h + U S V, and is exactly the base at the start. Most optimizers move U and V out of the complements;
    `project` moves them back. Outside of training, and in a merged weight, the change itself is projected: an optimizer
    that averages weights then shows factors that include steps from before their projection.

    The first vectors N_0 of the shorter side are a basis of its whole complement. So with many tokens the change is
    E N_0, where E = F S + F S B - F_0 S_0, F are the vectors of the longer side, and B = (N - N_0) N_0^T.
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
        return self._is_exact(product_dtype(x)) and self._pays(x) and computes_product(self.base_layer, x)

    def _pays(self, x: Tensor) -> bool:
        """Return True if x has so many tokens that the change is computed as one product E N_0."""
        return token_factor(x, self.out_features, self.in_features) > 1

    def _narrow_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        inner, outer = self._factors(dtype)
        return inner, None, outer

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.out_features < self.in_features:
            near, far = (self.left.T, self.first_left.T), (self.right.T, self.first_right.T)
            return self._far_factor(near, far, self.in_side, dtype), self.first_left
        near, far = (self.right, self.first_right), (self.left, self.first_left)
        return self.first_right.T, self._far_factor(near, far, self.out_side, dtype)

    def _far_factor(
        self, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], side: Complement, dtype: torch.dtype
    ) -> Tensor:
        """Return E, of the shape of F [n, r]; outside of training it is projected. The N are [r, m]."""
        turned = (near[0] - near[1]).to(dtype) @ near[1].to(dtype).T  # B
        mixed = far[0].to(dtype) @ (self.values[:, None] * turned).to(dtype)
        factor = (far[0] * self.values - far[1] * self.first_values + mixed).to(dtype)
        return factor if self.training else side.keep(factor.T).T

    def change(self, x: Tensor) -> Tensor:
        if self._pays(x):
            inner, outer = self._factors(x.dtype)
            return functional.linear(functional.linear(x, inner.T.to(x.dtype)), outer.to(x.dtype))
        if not self.training:
            x = self.in_side.keep(x)
        now = _apply(x, self.left, self.values, self.right)
        change = now - _apply(x, self.first_left, self.first_values, self.first_right)
        return change if self.training else self.out_side.keep(change)

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

    def project_gradients(self) -> None:
        """Remove from the gradients the parts in preserved directions, in bfloat16 if they come from such products.

        What that leaves of them the projection of the factors removes.
        """
        if self.left.grad is not None and self.right.grad is not None:
            dtype = torch.bfloat16 if self.computed is torch.bfloat16 else None
            self.project(self.left.grad, self.right.grad, dtype)

    @torch.no_grad()
    def project(self, left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> None:
        """Remove from [out, r] and [r, in], or their shards, the parts in preserved directions, computed in `dtype`."""
        outer, inner = self.whole_sides()
        columns, rows = (read_whole(t) if is_shard(t) else t for t in (left, right))
        write_whole(left, outer.keep(columns.T.to(dtype or columns.dtype)).T)
        write_whole(right, inner.keep(rows.to(dtype or rows.dtype)))


def _apply(x: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    inner = functional.linear(x, right.to(x.dtype)) * values.to(x.dtype)  # [..., r]
    return functional.linear(inner, left.to(inner.dtype))
